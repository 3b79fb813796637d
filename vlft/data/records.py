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
BOM = "\ufeff"


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
        raise DataError("found a folder", place=place, hint=f"name a {_any_of(FORMATS)} file")
    if kind not in readers:
        raise DataError(
            f"found {path.suffix!r} at the end of the name" if kind else "the name has no ending",
            place=place,
            hint=f"name a {_any_of(FORMATS)} file",
        )
    try:
        text = path.read_text(encoding="utf-8").lstrip(BOM)
    except FileNotFoundError:
        raise DataError("no such file", place=place, hint="check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 (byte {error.start})", place=place, hint="save the file as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot be read ({reason})", place=place, hint="check the path") from None
    if not text.strip():
        raise DataError(
            "the file is empty", place=place, hint='write e.g. {"query": "...", "response": "..."}'
        )
    return readers[kind](text, path)


def kind_of(value: object) -> str:
    """The type of a JSON value, in words."""
    kinds = {bool: "true or false", str: "text", list: "a list", dict: "an object"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def _read_lines(text: str, path: Path) -> Iterator[Record | DataError]:
    # Not splitlines(), which also splits at characters like U+2028 that JSON text may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        # Joined files have the byte order mark of each part at the start of a line inside.
        content = line.lstrip(BOM)
        if content.strip():
            try:
                value = json.loads(content)
            except (ValueError, RecursionError) as error:
                yield DataError(
                    f"not JSON: {_reason(error)}",
                    place=f"{shown(path)}:{number}",
                    hint="write one JSON object per line",
                )
                continue
            yield _as_record(value, path, number)


def _read_array(text: str, path: Path) -> Iterator[Record | DataError]:
    decoder = json.JSONDecoder()

    def blank(position: int) -> int:
        while position < len(text) and text[position].isspace():
            position += 1
        return position

    def problem(found: str, position: int) -> DataError:
        line = text.count("\n", 0, min(position, len(text.rstrip()))) + 1
        return DataError(
            found,
            place=f"{shown(path)}:{line}",
            hint="a .json file holds one array: [{...}, {...}]",
        )

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
        yield _as_record(value, path, line)
        position = blank(end)
        mark = text[position : position + 1]
        if mark not in (",", "]"):
            found = f"found {mark!r}" if mark else "the file ends"
            yield problem(f"{found} where the array goes on with ',' or ends with ']'", position)
            return
    if blank(position + 1) < len(text):
        yield problem("found text after the end of the array", blank(position + 1))


def _read_table(text: str, path: Path) -> Iterator[Record | DataError]:
    # StringIO splits at newlines only, unlike splitlines(); see _read_lines.
    reader = csv.reader(io.StringIO(text), strict=True)
    header: list[str] = []
    line = 1
    try:
        for row in reader:
            place = f"{shown(path)}:{line}"
            if row and not header:
                header = row
                twice = next((name for name in row if row.count(name) > 1), None)
                if twice is not None:
                    yield DataError(
                        f"column {twice!r} is {row.count(twice)} times in the header",
                        place=place,
                        hint="give every column another name",
                    )
                    return
            elif row and len(row) != len(header):
                yield DataError(
                    f"found {_cell_count(row)}, the header has {len(header)}",
                    place=place,
                    hint="quote cells that hold commas",
                )
            elif row:
                yield _cells(dict(zip(header, row, strict=True)), path, line)
            line = reader.line_num + 1
    except csv.Error as error:
        yield DataError(
            f"not CSV: {error}",
            place=f"{shown(path)}:{line}",
            hint='quote cells that hold quotes or line breaks, with " as ""; or use .jsonl',
        )


def _cells(row: dict[str, str], path: Path, line: int) -> Record | DataError:
    """A table row as a record: empty cells are absent fields, lists are written as JSON."""
    fields: dict[str, Any] = {}
    for name, cell in row.items():
        if name in ("images", "history") and cell.lstrip().startswith("["):
            try:
                fields[name] = json.loads(cell)
            except (ValueError, RecursionError) as error:
                example = '[""a.jpg"", ""b.jpg""]' if name == "images" else '[[""q"", ""r""]]'
                return DataError(
                    f'"{name}": not JSON: {_reason(error)}',
                    place=f"{shown(path)}:{line}",
                    hint=f'write e.g. "{example}"',
                )
        elif name == "images" and cell:
            fields[name] = [cell]
        elif cell:
            fields[name] = cell
    return Record(fields, path, line)


def _as_record(value: object, path: Path, line: int) -> Record | DataError:
    if not isinstance(value, dict):
        return DataError(
            f"found {kind_of(value)}, an object is allowed",
            place=f"{shown(path)}:{line}",
            hint='write e.g. {"query": "...", "response": "..."}',
        )
    return Record(value, path, line)


def _reason(error: ValueError | RecursionError) -> str:
    """Why a text is not JSON, in words."""
    if isinstance(error, json.JSONDecodeError):
        # Some messages of the json module end with "at" already.
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "too deeply nested" if isinstance(error, RecursionError) else "a number is too long"


def _cell_count(row: list[str]) -> str:
    return f"{len(row)} cell" if len(row) == 1 else f"{len(row)} cells"


def _any_of(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
