"""Records given through Python train like those of a file, and the run can be gone on with."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from conftest import SIGLIP
from PIL import Image

import vlft
from vlft.data.specs import expand
from vlft.errors import DataError


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.only_siglip
def test_a_run_on_records_is_that_on_their_file(tmp_path, monkeypatch):
    red, blue = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    red.save("red.png")
    blue.save("blue.png")
    data = io.BytesIO()
    blue.save(data, format="PNG")
    rows = [
        {"query": "<image>Colour?", "response": "red", "images": [red]},
        {"question": "Colour?", "answer": "blue", "image": data.getvalue()},
        {"messages": [
            {"role": "user", "content": [{"type": "image", "image": "red.png"}]},
            {"role": "assistant", "content": "red"},
        ]},
        {"query": "Colour?", "response": "blue", "image": {"bytes": data.getvalue(), "path": "x"}},
    ]  # fmt: skip
    names = ["red.png", "blue.png", None, "blue.png"]
    of_file = [
        {k: v for k, v in row.items() if k not in ("image", "images")} | ({"image": n} if n else {})
        for row, n in zip(rows, names, strict=True)
    ]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))

    def losses(dataset, **settings):
        run = vlft.sft(
            vlft.SftConfig(
                model=str(SIGLIP.folder),
                dataset=dataset,
                val_ratio=0,
                max_steps=2,
                batch_size=4,
                device="cpu",
                show_sample=False,
                **settings,
            )
        ).run
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return run, [line["loss"] for line in lines if "loss" in line]

    run, found = losses(rows, output_dir=tmp_path / "a")
    _, expected = losses(["train.jsonl"], output_dir=tmp_path / "b")
    assert found == expected
    assert len(found) == 2
    # The settings that are saved name the file that holds the records.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert vlft.sft(vlft.SftConfig(resume=run)).step == 2


def test_a_value_that_no_record_has():
    with pytest.raises(DataError, match=r"^record 2: .*set"):
        expand([{"query": "q"}, {"query": {1, 2}}])


def test_files_and_records_together():
    rows = [{"query": "q", "response": "r"}]
    assert expand(["a.jsonl", *rows, "b.jsonl"])[:2] == ["a.jsonl", "b.jsonl"]
    assert expand(rows) == expand(rows) != expand([*rows, *rows])
