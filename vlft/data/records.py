"""Data files -> records: the fields of each sample as read, and where they were read."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlft.errors import DataError, shown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FORMATS = (".jsonl", ".json", ".csv")
NAME_A_FILE = "name a .jsonl, .json or .csv file"
EXAMPLE = 'write e.g. {"query": "...", "response": "..."}'
BOM = "\ufeff"

# (line, fields of the record that starts there, or the problem of it)
Found = tuple[int, "dict[str, Any] | DataError"]


@dataclass(frozen=True)
class Record:
    """The fields of one sample as read.

    Attributes:
        fields: values by name, not checked yet.
        path: the data file.
        line: 1-based line in it where the record starts.
    """

    fields: dict[str, Any]
    path: Path
    line: int

    @property
    def place(self) -> str:
        """For messages: ``train.jsonl:17``."""
        return f"{shown(self.path)}:{self.line}"


def read_records(path: Path) -> Iterator[Record | DataError]:
    """The records of a file in order; a bad line yields its error and reading goes on.

    Raises:
        DataError: the file cannot be read at all.
    """
    readers = {".jsonl": _read_lines, ".json": _read_array, ".csv": _read_table}
    place, kind = shown(path), path.suffix.lower()
    if path.is_dir():
        raise DataError("found a folder", place=place, hint=NAME_A_FILE)
    if kind not in readers:
        found = (
            f"found {path.suffix!r} at the end of the name" if kind else "the name has no ending"
        )
        raise DataError(found, place=place, hint=NAME_A_FILE)
    try:
        text = path.read_text(encoding="utf-8").lstrip(BOM)
    except FileNotFoundError:
        raise DataError("no such file", place=place, hint="check the path") from None
    except UnicodeDecodeError as error:
        found = f"not UTF-8 (byte {error.start})"
        raise DataError(found, place=place, hint="save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot be read ({reason})", place=place, hint="check the path") from None
    if not text.strip():
        raise DataError("the file is empty", place=place, hint=EXAMPLE)
    return (
        DataError(found.message, place=f"{place}:{line}", hint=found.hint)
        if isinstance(found, DataError)
        else Record(found, path, line)
        for line, found in readers[kind](text)
    )


def kind_of(value: object) -> str:
    """The type of a JSON value, in words."""
    kinds = {bool: "true or false", str: "text", list: "a list", dict: "an object"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def _read_lines(text: str) -> Iterator[Found]:
    # Not splitlines(), which also splits at characters like U+2028 that JSON text may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        # Joined files have the byte order mark of each part at the start of a line inside.
        content = line.lstrip(BOM)
        if content.strip():
            try:
                yield number, _object(json.loads(content))
            except (ValueError, RecursionError) as error:
                hint = "write one JSON object per line"
                yield number, DataError(f"not JSON: {_reason(error)}", hint=hint)


def _read_array(text: str) -> Iterator[Found]:
    decoder = json.JSONDecoder()

    def blank(position: int) -> int:
        while position < len(text) and text[position].isspace():
            position += 1
        return position

    def problem(found: str, position: int) -> Found:
        line = text.count("\n", 0, min(position, len(text.rstrip()))) + 1
        return line, DataError(found, hint="a .json file holds one array: [{...}, {...}]")

    position, line, counted = blank(0), 1, 0
    mark = text[position]
    if mark != "[":
        yield problem(f"found {mark!r} where the array starts", position)
        return
    if text.startswith("]", blank(position + 1)):
        position, mark = blank(position + 1), "]"
    while mark != "]":
        position = blank(position + 1)
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield problem(f"not JSON: {_reason(error)}", getattr(error, "pos", position))
            return
        yield line, _object(value)
        position = blank(end)
        mark = text[position : position + 1]
        if mark not in (",", "]"):
            found = f"found {mark!r}" if mark else "the file ends"
            yield problem(f"{found} where the array goes on with ',' or ends with ']'", position)
            return
    if blank(position + 1) < len(text):
        yield problem("found text after the end of the array", blank(position + 1))


def _read_table(text: str) -> Iterator[Found]:
    # StringIO splits at newlines only, unlike splitlines(); see _read_lines.
    reader = csv.reader(io.StringIO(text), strict=True)
    header: list[str] = []
    line = 1
    try:
        for row in reader:
            if row and not header:
                header = row
                twice = next((name for name in row if row.count(name) > 1), None)
                if twice is not None:
                    found = f"column {twice!r} is {row.count(twice)} times in the header"
                    yield line, DataError(found, hint="give every column another name")
                    return
            elif row and len(row) != len(header):
                cells = "1 cell" if len(row) == 1 else f"{len(row)} cells"
                found = f"found {cells}, the header has {len(header)}"
                yield line, DataError(found, hint="quote cells that hold commas")
            elif row:
                yield line, _fields(dict(zip(header, row, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        hint = 'quote cells that hold quotes or line breaks, with " as ""; or use .jsonl'
        yield line, DataError(f"not CSV: {error}", hint=hint)


def _fields(row: dict[str, str]) -> dict[str, Any] | DataError:
    """The fields of a table row: empty cells are absent, lists are written as JSON."""
    fields: dict[str, Any] = {}
    for name, cell in row.items():
        if name in ("images", "history") and cell.lstrip().startswith("["):
            try:
                fields[name] = json.loads(cell)
            except (ValueError, RecursionError) as error:
                example = '[""a.jpg"", ""b.jpg""]' if name == "images" else '[[""q"", ""r""]]'
                return DataError(
                    f'"{name}": not JSON: {_reason(error)}', hint=f'write e.g. "{example}"'
                )
        elif name == "images" and cell:
            fields[name] = [cell]
        elif cell:
            fields[name] = cell
    return fields


def _object(value: object) -> dict[str, Any] | DataError:
    if isinstance(value, dict):
        return value
    return DataError(f"found {kind_of(value)}, an object is allowed", hint=EXAMPLE)


def _reason(error: ValueError | RecursionError) -> str:
    """Why a text is not JSON, in words."""
    if isinstance(error, json.JSONDecodeError):
        # Some messages of the json module end with "at" already.
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "too deeply nested" if isinstance(error, RecursionError) else "a number is too long"
