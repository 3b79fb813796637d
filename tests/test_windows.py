"""Files are read in parts: where a part ends changes nothing, and records are read in any order."""

from __future__ import annotations

import io
import json
import random

import pytest

from vlft.data.containers import window
from vlft.data.containers.json_text import BrokenTextError, read_json
from vlft.data.containers.table import read_table
from vlft.data.containers.window import NotTextError
from vlft.errors import DataError

ROWS = [
    {"query": f"ü{n} {{\\n", "response": "x" * n, "images": ["a\u2028.png"] * (n % 3)}
    for n in range(9)
]
TEXTS = {
    "lines": "\n".join(json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(ROWS)),
    "array": json.dumps(ROWS, indent=1, ensure_ascii=False),
    "objects": "\ufeff" + "\n".join(json.dumps(row, indent=1) for row in ROWS) + " \n",
    "one line": " ".join(json.dumps(row) for row in ROWS),
    "inside": json.dumps({"info": {"a": [1]}, "rows": ROWS}),
    "twice": '{"a": 1, "a": 2}\n' * 3,
    "numbers": "1234567890 null [] true",
}


def found_in(text: str) -> object:
    """All that is read of a text, in words that can be compared."""
    try:
        kind, records, note = read_json(io.BytesIO(text.encode()))
    except BrokenTextError as error:
        return error.line, error.message, error.hint
    rows = [
        (line, (value.message, value.hint) if isinstance(value, DataError) else value)
        for line, value in records
    ]
    order = list(range(len(records)))
    random.Random(0).shuffle(order)
    for index in order:
        line, value = records[index]
        assert line == rows[index][0]
        assert isinstance(value, DataError) or value == rows[index][1]
    return kind, rows, note


def mutated(text: str, draw: random.Random) -> str:
    for _ in range(draw.choice((1, 1, 2))):
        place = draw.randrange(len(text) + 1)
        cut = draw.choice((0, 0, 1, 5))
        text = (
            text[:place]
            + draw.choice(('"', "\n", "{", "}", "[", ",", "\\", "é", ""))
            + text[place + cut :]
        )
    return text


@pytest.mark.parametrize("name", TEXTS)
def test_the_length_of_a_part_changes_nothing(monkeypatch, name):
    draw = random.Random(name)
    for trial in range(40):
        text = mutated(TEXTS[name], draw) if trial else TEXTS[name]
        if not text.strip(" \n\ufeff"):
            continue
        monkeypatch.setattr(window, "CHUNK", 2**20)
        expected = found_in(text)
        monkeypatch.setattr(window, "CHUNK", draw.choice((1, 3, 17, 64)))
        assert found_in(text) == expected, text


def test_offsets_alone_are_kept():
    text = TEXTS["lines"]
    _, records, _ = read_json(io.BytesIO(text.encode()))
    assert [record[1] for record in records] == ROWS
    starts = [len(part.encode()) + 1 for part in text.split("\n")[:-1]]
    assert list(records.offsets) == [sum(starts[:n]) for n in range(len(ROWS))]
    assert not records.lines


def test_a_byte_that_is_no_text_is_named_by_its_place(monkeypatch):
    monkeypatch.setattr(window, "CHUNK", 8)
    data = b'{"a": "\xc3\xa9\xc3\xa9"}\n' * 2 + b'{"a": "\xff"}'
    with pytest.raises(NotTextError, match=rf"byte {data.index(0xFF)}\)"):
        read_json(io.BytesIO(data))
    with pytest.raises(NotTextError, match=r"byte 10\)"):
        read_table(io.BytesIO(b"a,b\n1,2\n3,\xff\n"))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_of_a_table_in_any_order(end):
    lines = ["\ufeffquery,response", 'é,"two', 'lines"', "", "q,r", "bad", "q2,r2"]
    _, records, _ = read_table(io.BytesIO(end.join(lines).encode()))
    rows = [records[index] for index in (3, 1, 0)]
    assert rows == [
        (7, {"query": "q2", "response": "r2"}),
        (5, {"query": "q", "response": "r"}),
        (2, {"query": "é", "response": "two\nlines"}),
    ]
    line, problem = records[2]
    assert (line, problem.message) == (6, "found 1 cell, the header has 2")
