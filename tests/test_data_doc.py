"""docs/data.md is true: its example records are read as it shows, and its commands succeed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN, OCR, make_rows, write_jsonl
from test_convert import COCO, OMNI, PAGE, REFER

from vlft.cli import app
from vlft.data.conversation import ImageRef
from vlft.data.names import IMAGES, QUESTIONS, REPLIES
from vlft.data.options import DataOptions, Reading
from vlft.data.specs import open_file
from vlft.data.split import Draws

DOC = (Path(__file__).parent.parent / "docs" / "data.md").read_text("utf-8")
# A block is left out if the page says "not run" above it, because its commands need a hub.
COMMANDS = [
    line.removeprefix("$ ")
    for note, block in re.findall(r"(<!-- not run.*?-->\n)?```console\n(.*?)```", DOC, re.DOTALL)
    for line in block.splitlines()
    if not note
]
EXAMPLES = re.findall(r"```json\n(.*?)```\n\n```text\n(.*?)```", DOC, flags=re.DOTALL)


def shown(conversation) -> str:
    lines = [] if conversation.system is None else [f"system: {conversation.system}".rstrip()]
    for turn in conversation.turns:
        parts = (f"[{p.given}]" if isinstance(p, ImageRef) else p for p in turn.parts)
        note = "" if turn.is_trained else " (not trained)"
        lines.append(f"{turn.role}: {''.join(parts)}{note}".replace("\n", "\\n"))
    return "\n".join(lines)


@pytest.mark.parametrize(("records", "expected"), EXAMPLES)
@pytest.mark.parametrize("is_array", [False, True])
def test_the_records_are_read_as_shown(records, expected, is_array, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        shutil.copy(GOLDEN / "images" / "speck.png", name)
    # A list in the place of a record can only stand in an array.
    lines = records.splitlines()
    if not is_array:
        lines = [line for line in lines if line.startswith("{")]
        expected = expected if len(lines) == len(records.splitlines()) else None
    text = json.dumps(list(map(json.loads, lines))) if is_array else "\n".join(lines)
    Path("train.jsonl").write_text(text, "utf-8")
    options = DataOptions(reading=Reading(has_boxes=True))
    file = open_file("train.jsonl", Draws(0), options, {})
    assert file.problems == ()
    if expected is not None:
        assert "\n\n".join(shown(item) for _, item in file.items) == expected.rstrip()


def test_every_layout_and_name_is_there():
    assert len(EXAMPLES) == DOC.count("```json") == 7
    for name in (*QUESTIONS, *REPLIES, *IMAGES):
        assert f"`{name}`" in DOC, name


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_run(command, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    rows = [{**row, "images": [str(GOLDEN / "images" / name) for name in row.get("images", ())]}
            for row in make_rows(8)]  # fmt: skip
    if " --output " not in command:
        write_jsonl(Path("train.jsonl"), rows[:6])
    for name in ("val.jsonl", "images.jsonl", "images/a.jsonl", "text.jsonl"):
        write_jsonl(Path(name), rows[6:])
    for name, value in (("instances", COCO), ("refs", REFER), ("OmniDocBench", OMNI)):
        Path(f"{name}.json").write_text(json.dumps(value), "utf-8")
    for folder in (".", "scans", "images"):
        Path(folder).mkdir(exist_ok=True)
        for name in ("a.png", "b.png"):
            shutil.copy(GOLDEN / "images" / "chart.png", Path(folder, name))
    Path("page").mkdir()
    Path("page", "1.xml").write_text(PAGE, "utf-8")
    words = shlex.split(command.replace("deepseek-ai/DeepSeek-OCR", str(OCR.folder)), comments=True)
    given = [
        found
        for word in words[1:]
        for found in (map(str, Path().glob(word)) if word.endswith("*.xml") else [word])
    ]
    steps = ["--max-steps", "1"] if given[0] == "sft" else []
    monkeypatch.setattr(sys, "argv", ["vlft", *given, *steps])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert stop.value.code in (0, None), capfd.readouterr().err


def test_no_more_commands_are_left_out_than_those_of_hubs():
    left_out = [line for line in DOC.splitlines() if line.startswith("$ ")]
    assert len(left_out) - len(COMMANDS) == DOC.count("--dataset hf:") + DOC.count("--dataset ms:")
