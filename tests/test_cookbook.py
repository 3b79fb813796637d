"""The records of docs/cookbook.md are read, and its commands have valid settings."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import OCR, SIGLIP, VL2_NOAUX
from PIL import Image

from vlft.checkpoints.locate import describe
from vlft.cli.commands import COMMANDS
from vlft.cli.options import read_settings

DOC = (Path(__file__).parent.parent / "docs" / "cookbook.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", DOC, re.M | re.S))
CASES = {"Boxes": VL2_NOAUX, "Tune DeepSeek-OCR on your documents": OCR}


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


RECORDS = [
    pytest.param(title, line, id=f"{title}-{number}")
    for title, text in SECTIONS.items()
    for number, line in enumerate("".join(blocks(text, "json")).splitlines())
]


@pytest.mark.parametrize(("title", "line"), RECORDS)
def test_a_record_is_read(title, line, tmp_path):
    row = json.loads(line)
    for name in row.get("images", ()):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (96, 64), "white").save(tmp_path / name)
    processor = describe(CASES.get(title, SIGLIP).folder).processor()
    sample = processor.encode(row, tmp_path)
    trained = processor.text(sample.labels[sample.labels != -100].tolist())
    reply = row["response"].replace("<ref-object><bbox>", "<|ref|>the red bus<|/ref|><|det|>")
    assert reply.split()[0] in trained


def test_the_tasks_are_there():
    named = ["Captions", "Questions about images", "Boxes", "Several images"]
    assert list(SECTIONS)[:4] == named
    for title in named:
        assert re.findall(r"^\*\*(Data|Expect)\b", SECTIONS[title], re.M) == ["Data", "Expect"]
        assert blocks(SECTIONS[title], "sh")
        assert "| flag | when |" in SECTIONS[title]


def test_commands_have_valid_settings():
    joined = "".join(blocks(DOC, "sh")).replace("\\\n", " ")
    lines = [shlex.split(line) for line in joined.splitlines() if line.startswith("vlft ")]
    assert len(lines) > 12
    for _, name, *words in lines:
        read_settings(COMMANDS[name].config, name, words)
