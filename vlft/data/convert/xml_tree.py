"""XML files of other people -> a tree of elements. Nothing outside of the file is ever read.

A document type, which may declare entities and name other files, is refused. The size of a file,
the number of its elements and their depth are bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from xml.parsers import expat

from vlft.errors import DataError, shown
from vlft.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LARGEST_FILE = 2**25
MOST_ELEMENTS = 1_000_000
DEEPEST = 100


@dataclass(slots=True)
class Element:
    """An element without its namespace.

    Attributes:
        line: of the file where it starts.
        pieces: of the characters right inside it.
    """

    name: str
    attributes: dict[str, str]
    line: int
    pieces: list[str] = field(default_factory=list)
    children: list[Element] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text directly inside the element, without that of its children."""
        return "".join(self.pieces)

    def index(self, name: str) -> int | None:
        """A whole number among its attributes; None if there is none."""
        value = self.attributes.get(name, "")
        return int(value) if re.fullmatch("[0-9]{1,9}", value) else None

    def all(self, *names: str) -> Iterator[Element]:
        """The elements below with one of these names, in the order of the file."""
        for child in self.children:
            if child.name in names:
                yield child
            yield from child.all(*names)

    def own(self, *names: str) -> Iterator[Element]:
        """The children with one of these names."""
        return (child for child in self.children if child.name in names)


class _Builder:
    """The handlers that expat calls; they build a bounded tree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parser = expat.ParserCreate(namespace_separator=" ")
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters
        self.parser.StartDoctypeDeclHandler = self._doctype
        self.root: Element | None = None
        self._open: list[Element] = []
        self._count = 0

    def error(self, found: str, hint: str, line: int = 0) -> DataError:
        line = line or self.parser.CurrentLineNumber
        return DataError(found, place=f"{shown(self.path)}:{line}", hint=hint)

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._count += 1
        if self._count > MOST_ELEMENTS:
            raise self.error(f"more than {MOST_ELEMENTS:,} elements", "cut the file into pages")
        if len(self._open) >= DEEPEST:
            raise self.error(f"elements more than {DEEPEST} deep", "this is no PAGE or ALTO file")
        named = {key.rpartition(" ")[2]: value for key, value in attributes.items()}
        element = Element(name.rpartition(" ")[2], named, self.parser.CurrentLineNumber)
        if self._open:
            self._open[-1].children.append(element)
        else:
            self.root = element
        self._open.append(element)

    def _end(self, _name: str) -> None:
        self._open.pop()

    def _characters(self, text: str) -> None:
        self._open[-1].pieces.append(text)

    def _doctype(self, *_declared: object) -> None:
        found = "found a document type (<!DOCTYPE>), which may declare entities and other files"
        raise self.error(found, "remove it from the file; PAGE and ALTO need none")


def read_xml(path: Path) -> Element:
    """The root of an XML file.

    Raises:
        DataError: it is missing, too large or not well-formed, or has a document type.
    """
    try:
        with open_regular(path) as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
        raise DataError(found, place=shown(path), hint="check the path") from None
    if len(data) > LARGEST_FILE:
        found = f"more than {LARGEST_FILE:,} bytes, which is the most that is read"
        raise DataError(found, place=shown(path), hint="write a file for each page")
    builder = _Builder(path)
    try:
        builder.parser.Parse(data, True)
    except expat.ExpatError as error:
        found = f"not XML: {expat.ErrorString(error.code)} at column {error.offset + 1}"
        raise builder.error(found, "write the file again", error.lineno) from None
    except (LookupError, ValueError) as error:
        found = f"not XML: {error}"
        raise builder.error(found, "save the file as UTF-8") from None
    if builder.root is None:
        raise builder.error("no element", "write the file again")
    return builder.root
