"""Tables of text (CSV) -> records. Cells stay text, and an empty one is absent."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import TYPE_CHECKING, Any

from vlft.data.containers.indexed import Indexed
from vlft.data.containers.json_text import reason
from vlft.data.containers.window import NotTextError
from vlft.data.names import KNOWN
from vlft.data.records import BOM
from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import BinaryIO

    from vlft.data.records import Value

# An image in base64 takes more than the csv module's 131,072 characters.
LONGEST_CELL = 2**31 - 1
# Columns that hold JSON where it starts with a bracket.
LISTS = {"images": '[""a.jpg"", ""b.jpg""]', "history": '[[""q"", ""r""]]'}
LINE = re.compile("[^\\r\\n]*(?:\\r\\n|\\r|\\n)|[^\\r\\n]+")
SEPARATORS = {",": "commas", "\t": "TAB characters", ";": "semicolons"}


def read_table(file: BinaryIO) -> tuple[str, Indexed, str]:
    """The kind of a table, its records, and an empty note.

    Raises:
        NotTextError: it is no UTF-8.
    """
    csv.field_size_limit(LONGEST_CELL)
    file.seek(0)
    lines = _Lines(file)
    first = next((line for line in lines if line.strip()), "")
    separator = next((mark for mark in SEPARATORS if mark in first.lstrip()), ",")
    header: list[str] = []
    records = Indexed(file, lambda data: _row(data, header, separator))
    file.seek(0)
    for place, cells, problem in _rows(file, separator):
        if problem is None and not header:
            header += map(_column, cells)
            problem = _twice(header)
            if problem is not None:
                records.add(place, problem)
                break
        else:
            records.add(place, problem)
    return f"CSV with {SEPARATORS[separator]}", records, ""


class _Lines:
    """The lines of a file with their ends as newlines, also inside of cells.

    Attributes:
        offset: byte where the next line starts.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.offset = file.tell()
        self._lines = self._of(file)

    def __iter__(self) -> Iterator[str]:
        return self._lines

    def _of(self, file: BinaryIO) -> Iterator[str]:
        for data in file:
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise NotTextError(error.start + self.offset) from None
            if not self.offset and text.startswith(BOM):
                text = text.lstrip(BOM)
                self.offset = len(data) - len(text.encode())
                data = data[self.offset :]
            if "\r" not in text:
                self.offset += len(data)
                yield text
                continue
            for line in LINE.findall(text):
                self.offset += len(line.encode())
                yield line.rstrip("\r\n") + "\n" if line[-1] in "\r\n" else line


def _rows(
    file: BinaryIO, separator: str
) -> Iterator[tuple[tuple[int, int], list[str], DataError | None]]:
    """First byte and line of each row that is not empty, its cells, and its problem."""
    lines = _Lines(file)
    reader = csv.reader(lines, strict=True, delimiter=separator)
    offset, line = lines.offset, 1
    try:
        for row in reader:
            if row:
                yield (offset, line), row, None
            offset, line = lines.offset, reader.line_num + 1
    except csv.Error as error:
        hint = 'quote cells that hold quotes or line breaks, with " as ""; or use .jsonl'
        yield (offset, line), [], DataError(f"not CSV: {error}", hint=hint)


def _twice(header: Sequence[str]) -> DataError | None:
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is None:
        return None
    found = f"column {twice!r} is {header.count(twice)} times in the header"
    return DataError(found, hint="give every column another name")


def _row(data: bytes, header: Sequence[str], separator: str) -> Value:
    """Parses one record from its bytes; bytes of the next record may follow."""
    _, row, _ = next(_rows(io.BytesIO(data), separator))
    if len(row) != len(header):
        cells = "1 cell" if len(row) == 1 else f"{len(row)} cells"
        found = f"found {cells}, the header has {len(header)}"
        return DataError(found, hint=f"quote cells that hold {SEPARATORS[separator]}")
    return _fields(dict(zip(header, row, strict=True)))


def _column(name: str) -> str:
    """A name of the header; known names may be in any case, one without text is bookkeeping."""
    if not name.strip():
        return ""
    return name.lower() if name.lower() in KNOWN else name


def _fields(row: dict[str, str]) -> dict[str, Any] | DataError:
    fields: dict[str, Any] = {}
    for name, cell in row.items():
        if name in LISTS and cell.lstrip().startswith("["):
            try:
                fields[name] = json.loads(cell)
            except (ValueError, RecursionError) as error:
                hint = f'write e.g. "{LISTS[name]}"'
                return DataError(f'"{name}": not JSON: {reason(error)}', hint=hint)
        elif name and cell:
            fields[name] = cell
    return fields
