"""Data files -> records: the fields of each sample as read, and the place they came from."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FORMATS = (".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class Record:
    """The fields of one sample as read.

    Attributes:
        fields: by name, unchecked.
        path: the data file.
        line: 1-based line in it where the record starts.
    """

    fields: dict[str, Any]
    path: Path
    line: int

    @property
    def place(self) -> str:
        """For messages: ``train.jsonl:17``."""
        return f"{self.path}:{self.line}"


def read_records(path: Path) -> Iterator[Record | DataError]:
    """The records of a file in order; a bad line yields its error and reading goes on.

    Raises:
        DataError: the file cannot be read at all.
    """
    if path.suffix not in FORMATS:
        raise DataError(
            f"found {path.suffix or 'no ending'!r}; allowed: {', '.join(FORMATS)}", place=str(path)
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError("no such file", place=str(path), hint="check the path") from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", place=str(path)) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 (byte {error.start})", place=str(path), hint="save the file as UTF-8"
        ) from None
    if not text.strip():
        raise DataError("the file is empty", place=str(path), hint="write one JSON object per line")
    readers = {".jsonl": _read_lines, ".json": _read_array, ".csv": _read_table}
    return readers[path.suffix](text, path)


def _read_lines(text: str, path: Path) -> Iterator[Record | DataError]:
    # Not splitlines(): it also cuts at U+2028 and its like, which JSON text may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                yield DataError(
                    f"not JSON: {error.msg} at column {error.colno}",
                    place=f"{path}:{number}",
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
        line = text.count("\n", 0, position) + 1
        return DataError(
            found, place=f"{path}:{line}", hint="a .json file holds one array: [{...}, {...}]"
        )

    position = blank(0)
    if text[position] != "[":
        yield problem(f"found {text[position]!r} where the array starts", position)
        return
    position, line, counted = blank(position + 1), 1, 0
    while position < len(text) and text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            yield problem(f"not JSON: {error.msg}", error.pos)
            return
        yield _as_record(value, path, line)
        position = blank(position)
        if position < len(text) and text[position] == ",":
            position = blank(position + 1)
        elif position >= len(text) or text[position] != "]":
            yield problem("the array does not go on or end here", min(position, len(text) - 1))
            return


def _read_table(text: str, path: Path) -> Iterator[Record | DataError]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                yield DataError(
                    f"the header has {len(reader.fieldnames or ())} columns, this row not",
                    place=place,
                    hint="quote cells that hold commas",
                )
                continue
            yield _cells(row, path, reader.line_num)
    except csv.Error as error:
        yield DataError(f"not CSV: {error}", place=f"{path}:{reader.line_num}")


def _cells(row: dict[str, str], path: Path, line: int) -> Record | DataError:
    """A table row as a record: an empty cell is absent, a list is written as JSON."""
    fields: dict[str, Any] = {}
    for name, cell in row.items():
        if name in ("images", "history") and cell.lstrip().startswith("["):
            try:
                fields[name] = json.loads(cell)
            except json.JSONDecodeError as error:
                return DataError(
                    f"{name}: not JSON: {error.msg}",
                    place=f"{path}:{line}",
                    hint='write e.g. "[""a.jpg"", ""b.jpg""]"',
                )
        elif name == "images" and cell:
            fields[name] = [cell]
        elif cell:
            fields[name] = cell
    return Record(fields, path, line)


def _as_record(value: object, path: Path, line: int) -> Record | DataError:
    if not isinstance(value, dict):
        return DataError(
            f"found {type(value).__name__}, an object is allowed",
            place=f"{path}:{line}",
            hint='write e.g. {"query": "...", "response": "..."}',
        )
    return Record(value, path, line)
