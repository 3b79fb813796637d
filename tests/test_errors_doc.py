"""docs/errors.md: every command of it is run, and must say what stands there, word by word."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import GOLDEN, write_jsonl

import vlft
import vlft.checkpoints.merge
import vlft.training.run  # Here, as a command says that it loads what takes long to import.
from vlft.cli import app

DOC = Path(__file__).parent.parent / "docs" / "errors.md"
MODEL = GOLDEN / "checkpoints" / "deepseek-vl-siglip"
RUN = Path("output/model/v0-20261121-101500")
GOOD = {"query": "<image>What is this?", "response": "A photo.", "images": ["a.jpg"]}


@dataclass(frozen=True)
class Example:
    """A section of the page.

    Attributes:
        title: its heading.
        records: what follows the good line in train.jsonl.
        command: as typed.
        message: what stderr must hold.
    """

    title: str
    records: str
    command: str
    message: str


def read_examples() -> list[Example]:
    examples = []
    for section in DOC.read_text("utf-8").split("\n## ")[1:]:
        blocks = dict(re.findall(r"```(\w+)\n(.*?)```", section, flags=re.DOTALL))
        typed, _, message = blocks["console"].partition("\n")
        assert typed.startswith("$ vlft "), typed
        title = section.splitlines()[0]
        examples.append(Example(title, blocks.get("json", ""), typed[2:], message))
    return examples


EXAMPLES = read_examples()
RUN_EXAMPLES = {"The output folder is in use", "A run is resumed with other settings"}


@pytest.fixture(scope="module")
def real_run(tmp_path_factory) -> Path:
    """A run of one step with default settings, made once."""
    folder = tmp_path_factory.mktemp("run")
    row = {"query": "What is this?", "response": "A cat."}
    data = write_jsonl(folder / "train.jsonl", [row, {**row, "query": "And this?"}])
    config = vlft.SftConfig(
        model=str(MODEL),
        dataset=(str(data),),
        max_steps=1,
        device="cpu",
        output_dir=folder / "output",
        show_sample=False,
    )
    return vlft.sft(config).run


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """The folder that the page speaks of."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(MODEL)
    for name, source in (("a.jpg", "photo_a.jpg"), ("b.jpg", "photo_b.jpg")):
        shutil.copy(GOLDEN / "images" / source, name)
    Path("cut.jpg").write_bytes(Path("a.jpg").read_bytes()[:3000])
    write_jsonl(Path("train.jsonl"), [GOOD])
    Path("empty.jsonl").touch()
    Path("merged").mkdir()
    Path("merged/notes.txt").write_text("mine")
    return tmp_path


def prepare(example: Example, request) -> None:
    with Path("train.jsonl").open("a", encoding="utf-8") as file:
        file.write(example.records)
    if example.title in RUN_EXAMPLES:
        shutil.copytree(request.getfixturevalue("real_run"), RUN, symlinks=True)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_the_command_says_what_the_page_says(example, workplace, monkeypatch, capsys, request):
    prepare(example, request)
    before = snapshot(workplace)
    monkeypatch.setattr(sys, "argv", shlex.split(example.command))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        app.main()
    output = capsys.readouterr()
    # How a file was read is said before what comes after the data.
    assert re.sub(r"^train\.jsonl: JSON Lines, .*\n", "", output.err) == example.message
    assert output.out == ""
    assert exit_.value.code == 2
    # What was there is as it was.
    after = snapshot(workplace)
    assert {name: after.get(name) for name in before} == before


def test_the_real_command_too(workplace, request):
    example = next(item for item in EXAMPLES if item.title == "Several at once")
    prepare(example, request)
    arguments = shlex.split(example.command)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "vlft", *arguments], capture_output=True, text=True, check=False
    )
    loading = f"vlft {vlft.__version__}: loading torch and transformers\n"
    assert (done.returncode, done.stderr, done.stdout) == (2, loading + example.message, "")


def test_the_page_shows_what_it_should():
    assert len({example.title for example in EXAMPLES}) == len(EXAMPLES) >= 12
    assert {example.title for example in EXAMPLES} >= RUN_EXAMPLES
    assert sum(bool(example.records) for example in EXAMPLES) == 8
    for example in EXAMPLES:
        # Each problem with its hint, no machine's paths, no class names.
        lines = example.message.splitlines()
        assert [line.split(":")[0] for line in lines] == ["error", " hint"] * (len(lines) // 2)
        assert not re.search(r"(?<![\w.])/\w|Traceback|Error|NoneType", example.message)
