"""Documents that are named on the command line -> records: images, and the pages of PDF files."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.console import info, tracked, warn
from vlft.data.in_memory import keep_records
from vlft.data.layouts.place import COMMON_TAG
from vlft.data.pdf import is_pdf, open_pdf
from vlft.data.skipped import in_one_line
from vlft.errors import DataError, UsageError, raise_all, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vlft.data.items import Inspected
    from vlft.data.pdf import PdfFile

ADDRESS = re.compile(r"(?!file:)\w+://|data:", re.IGNORECASE)


@dataclass(frozen=True)
class Document:
    """An image file, or a PDF file as an image of each page.

    Attributes:
        path: as the user has named it.
        pages: image files; those of a PDF file are there once they are drawn.
        pdf: the PDF file, None for an image.
    """

    path: Path
    pages: tuple[Path, ...]
    pdf: PdfFile | None = None

    def records(self, query: str, together: int = 1) -> list[dict[str, Any]]:
        """A record of the native layout for each page, or for so many pages ``together``."""
        count = len(self.pages)
        firsts = range(0, count, together)
        return [self._record(query, first, min(first + together, count)) for first in firsts]

    def _record(self, query: str, first: int, end: int) -> dict[str, Any]:
        """The record of the pages from ``first`` to before ``end``, both from 0."""
        name, pages = str(self.path), self.pages[first:end]
        numbers = f"{first + 1}-{end}" if len(pages) > 1 else str(first + 1)
        if query.count(COMMON_TAG) == 1:
            query = query.replace(COMMON_TAG, COMMON_TAG * len(pages))
        meta = {"document": name, "page": first + 1, "pages": len(self.pages)}
        return {
            "query": query,
            "images": [str(page.absolute()) for page in pages],
            "id": f"{name}#page={numbers}" if self.pdf else name,
            "meta": meta | ({"last_page": end} if len(pages) > 1 else {}),
        }


def open_documents(given: Sequence[str], dpi: int, *, strict: bool) -> list[Document]:
    """The documents that are named, each once, in order.

    Args:
        given: paths and patterns like ``scans/*.jpg``.
        dpi: resolution of the pages of PDF files, in dots per inch.
        strict: whether a document that cannot be opened is an error; else it is left out.

    Raises:
        UsageError: what cannot be opened, if ``strict``, or nothing is left.
    """
    if not given:
        return []
    documents: list[Document] = []
    problems: list[UsageError] = []
    paths = _paths(given)
    for path in tracked(paths, "opening documents", len(paths)):
        try:
            documents.append(_open(path, dpi))
        except UsageError as error:
            problems.append(error)
    if problems and (strict or not documents):
        raise_all(problems)
    if problems:
        warn(in_one_line(problems))
    counts = [len(item.pages) for item in documents if item.pdf]
    images = len(documents) - len(counts)
    info(f"documents: {images} images, {len(counts)} PDF files of {sum(counts)} pages")
    return documents


class Pages:
    """The pages of PDF files among some documents, which are drawn when they are needed.

    Attributes:
        inspected: facts of their images before they are drawn, by path.
    """

    def __init__(self, documents: Iterable[Document]) -> None:
        self._places = {
            page: (document.pdf, number)
            for document in documents
            if document.pdf
            for number, page in enumerate(document.pages)
        }
        self.inspected: Inspected = {
            page: pdf.facts(number) for page, (pdf, number) in self._places.items()
        }

    def draw(self, images: Iterable[Path]) -> None:
        """Draws those of the images that are pages and not in the cache.

        Raises:
            DataError: a file has changed since it was opened, or a page cannot be drawn.
        """
        wanted: dict[Path, tuple[PdfFile, list[int]]] = {}
        for image in images:
            if image in self._places:
                pdf, number = self._places[image]
                wanted.setdefault(pdf.path, (pdf, []))[1].append(number)
        for pdf, numbers in wanted.values():
            pdf.draw(numbers)


def keep_documents(documents: Sequence[Document], query: str, together: int) -> str:
    """The path of a data file with a record for each page, or for so many ``together``."""
    return keep_records([row for item in documents for row in item.records(query, together)])


def _open(path: Path, dpi: int) -> Document:
    """The document of a file.

    Raises:
        UsageError: it cannot be opened.
    """
    if not is_pdf(path):
        return Document(path, (path,))
    pdf = open_pdf(path, dpi)
    return Document(path, tuple(map(pdf.image, range(len(pdf.sizes)))), pdf)


def _paths(given: Sequence[str]) -> list[Path]:
    """The files, in the order of numbers in their names where a pattern matches several.

    Raises:
        UsageError: a pattern matches nothing, or a name is no file.
    """
    made: dict[Path, None] = {}
    problems: list[UsageError] = []
    for name in given:
        found = [name]
        if glob.has_magic(name) and not Path(name).exists():
            found = sorted(glob.glob(name, recursive=True), key=_numbers_as_such)  # noqa: PTH207
            if not found:
                hint = "check the pattern"
                problems.append(DataError("matches no file", place=shown(Path(name)), hint=hint))
        for item in found:
            try:
                _check(item)
                made[Path(item)] = None
            except DataError as error:
                problems.append(error)
    raise_all(problems)
    return list(made)


def _check(name: str) -> None:
    """Raises DataError if a name is not that of a file."""
    path = Path(name)
    if ADDRESS.match(name):
        found = f"found {name[:200]!r}; files are allowed"
        raise DataError(found, place="--image", hint="download it, and name the file")
    if path.is_dir():
        hint = f"write '{path}/*' for what is in it"
        raise DataError("found a folder", place=shown(path), hint=hint)
    if not path.exists():
        hint = "relative paths start at the working directory"
        raise DataError("no such file", place=shown(path), hint=hint)


def _numbers_as_such(name: str) -> list[tuple[int, str]]:
    """A key that puts page-2 before page-10."""
    parts = re.split(r"(\d{1,18})", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
