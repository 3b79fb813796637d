"""docs/data.md: the records of its examples give the conversations below them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import GOLDEN

from vlft.data.conversation import ImageRef
from vlft.data.names import IMAGES, QUESTIONS, REPLIES
from vlft.data.options import DataOptions, Reading
from vlft.data.specs import open_file
from vlft.data.split import Draws

DOC = (Path(__file__).parent.parent / "docs" / "data.md").read_text("utf-8")
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
