"""Tables of text (CSV) -> records. Cells stay text, and an empty one is absent."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

from vlft.data.containers.json_text import reason
from vlft.data.names import KNOWN
from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlft.data.records import Found

# An image in base64 takes more than the csv module's 131,072 characters.
LONGEST_CELL = 2**31 - 1
# Columns that hold JSON where it starts with a bracket.
LISTS = {"images": '[""a.jpg"", ""b.jpg""]', "history": '[[""q"", ""r""]]'}
SEPARATORS = {",": "commas", "\t": "TAB characters", ";": "semicolons"}


def read_table(text: str) -> tuple[str, list[Found], str]:
    """The kind of a table, its records, and an empty note."""
    # Line ends inside of cells as everywhere: StringIO below knows newlines alone.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    header = text.lstrip().split("\n", 1)[0]
    separator = next((mark for mark in SEPARATORS if mark in header), ",")
    return f"CSV with {SEPARATORS[separator]}", list(_rows(text, separator)), ""


def _rows(text: str, separator: str) -> Iterator[Found]:
    csv.field_size_limit(LONGEST_CELL)
    # StringIO splits at newlines only, unlike splitlines(), which knows U+2028 and others.
    reader = csv.reader(io.StringIO(text), strict=True, delimiter=separator)
    header: list[str] = []
    line = 1
    try:
        for row in reader:
            if row and not header:
                header = [_column(name) for name in row]
                twice = next((name for name in header if name and header.count(name) > 1), None)
                if twice is not None:
                    found = f"column {twice!r} is {header.count(twice)} times in the header"
                    yield line, DataError(found, hint="give every column another name")
                    return
            elif row and len(row) != len(header):
                cells = "1 cell" if len(row) == 1 else f"{len(row)} cells"
                found = f"found {cells}, the header has {len(header)}"
                yield line, DataError(found, hint=f"quote cells that hold {SEPARATORS[separator]}")
            elif row:
                yield line, _fields(dict(zip(header, row, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        hint = 'quote cells that hold quotes or line breaks, with " as ""; or use .jsonl'
        yield line, DataError(f"not CSV: {error}", hint=hint)


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
