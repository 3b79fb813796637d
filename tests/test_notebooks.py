"""The notebooks of examples/ run from top to bottom, tiny models in the place of published ones."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.ipynb"))
GOLDEN = ROOT / "tests/golden/checkpoints"

# What the tests set after the cell with the parameters. A model that can learn is not needed: what
# is learned is tested elsewhere.
PARAMETERS = {
    "ocr_documents": {
        "MODEL": str(ROOT / "sample_data/ocr/tiny-ocr"),
        "PAGES": 6,
        "HELD_OUT": 2,
        "MEMORY": "--quantize nf4 --image-mode tiny",
        "TRAINING": "--lora-target-modules ALL --batch-size 3 --max-steps 2",
    },
    "vl2_grounding": {
        "MODEL": str(GOLDEN / "deepseek-vl2-mha"),
        "IMAGES": 3,
        "HELD_OUT": 1,
        "MEMORY": "--max-tiles 1",
        "TRAINING": "--batch-size 3 --max-steps 2",
    },
    "vl_captions": {
        "MODEL": str(ROOT / "sample_data/tiny-vl"),
        "IMAGES": 8,
        "HELD_OUT": 3,
        "TRAINING": "--train-aligner --batch-size 4 --max-steps 2",
    },
}


def cells(book, tag: str) -> list[int]:
    """Places of the cells with a tag."""
    return [i for i, cell in enumerate(book.cells) if tag in cell.metadata.get("tags", [])]


def test_every_notebook_has_parameters_here():
    assert [path.stem for path in EXAMPLES] == sorted(PARAMETERS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_stored_without_outputs(path):
    book = nbformat.read(path, 4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert len(cells(book, "parameters")) == len(cells(book, "install")) == 1


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch, request):
    """All but the installation; a cell whose command fails ends it, as a traceback would."""
    if not request.config.getoption("--notebooks"):
        pytest.skip("takes a minute: --notebooks, or make test-all")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    book = nbformat.read(path, 4)
    del book.cells[cells(book, "install")[0]]
    place = cells(book, "parameters")[0]
    own = {line.split(" = ")[0].split(",")[0] for line in book.cells[place].source.splitlines()}
    assert {"MODEL", "TRAINING"} <= own
    given = "\n".join(f"{name} = {value!r}" for name, value in PARAMETERS[path.stem].items())
    book.cells.insert(place + 1, nbformat.v4.new_code_cell(given))
    # IPython keeps the exit code of the last command of a cell and goes on.
    check = "\nassert globals().get('_exit_code', 0) == 0"
    for cell in book.cells:
        if cell.cell_type == "code" and "!vlft" in cell.source:
            cell.source += check
    NotebookClient(book, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        output.get("text", "")
        for cell in book.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert "done: 2 steps" in printed
    assert list(tmp_path.glob("output/*/v*/report.html"))
    assert (tmp_path / "tuned.jsonl").exists()
