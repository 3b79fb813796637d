"""PDF files -> an image file of each page, drawn when it is needed, by pypdfium2 (vlft[pdf]).

images/pages/<SHA-256>.png   in the cache: a page, named by the file's bytes, its number and the dpi
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.console import tracked
from vlft.data.conversation import ImageFacts
from vlft.data.image_cache import NAME
from vlft.data.images import LONGEST_SIDE, MOST_PIXELS
from vlft.data.receipt import stamp_of
from vlft.errors import ConfigError, DataError, shown
from vlft.files import cache_folder, digest, open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

POINTS = 72  # per inch: the unit of a page's size
START = b"%PDF-"
# Where readers of PDF look for it: other bytes may stand before.
HEAD = 1024
PASSWORD_WRONG = 4  # FPDF_ERR_PASSWORD


@dataclass(frozen=True)
class PdfFile:
    """A PDF file whose pages can be drawn.

    Attributes:
        path: of the file.
        dpi: dots per inch.
        stamp: size, times and inode of the file, see ``receipt.stamp_of``.
        digest: SHA-256 of its bytes.
        sizes: (width, height) of each page, in pixels.
    """

    path: Path
    dpi: int
    stamp: list[int] | None
    digest: str
    sizes: tuple[tuple[int, int], ...]

    def facts(self, page: int) -> ImageFacts:
        """What is known of the image of a page, from 0, before it is drawn.

        Its digest is one of the file, the page and the resolution, and not of the image's bytes.
        """
        name = f"{self.digest} {page} {self.dpi} {_version()}"
        return ImageFacts(hashlib.sha256(name.encode()).hexdigest(), self.sizes[page])

    def image(self, page: int) -> Path:
        """The image file of a page, from 0, once it is drawn."""
        return cache_folder(NAME) / "pages" / f"{self.facts(page).digest}.png"

    def draw(self, pages: Sequence[int]) -> None:
        """Draws the pages, from 0, that are not in the cache.

        Raises:
            DataError: the file has changed since it was opened, or a page cannot be drawn.
        """
        missing = [page for page in pages if not self.image(page).is_file()]
        if not missing:
            return
        self._check_unchanged()
        with _opened(self.path) as document:
            for page in missing:
                with _page_errors(self.path, page):
                    _draw(document, page, self.dpi, self.image(page))

    def _check_unchanged(self) -> None:
        """Raises DataError if the file is no longer what it was when it was opened."""
        stamp = stamp_of(self.path)
        if stamp is None:
            raise DataError("no longer there", place=shown(self.path), hint="put the file back")
        if stamp != self.stamp and digest(self.path) != self.digest:
            found = "has changed since it was opened"
            hint = "put the old file back, or start again with another --output"
            raise DataError(found, place=shown(self.path), hint=hint)


def is_pdf(path: Path) -> bool:
    """Whether a file is a PDF file, by its first bytes.

    Raises:
        DataError: it is no regular file, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            return START in file.read(HEAD)
    except OSError as error:
        found = f"cannot be read ({error.strerror or error})"
        raise DataError(found, place=shown(path), hint="name another file") from None


def open_pdf(path: Path, dpi: int) -> PdfFile:
    """A PDF file with the sizes of its pages; none is drawn.

    Args:
        path: of the file.
        dpi: dots per inch.

    Raises:
        ConfigError: pypdfium2 is not installed.
        DataError: the file is damaged, needs a password or has no pages, or a page is too large.
    """
    stamp = stamp_of(path)
    with _opened(path) as document:
        if not len(document):
            raise DataError("has no pages", place=shown(path), hint="name another file")
        numbers = tracked(range(len(document)), f"pages of {path.name}", len(document))
        sizes = tuple(_size(document, page, dpi, path) for page in numbers)
    return PdfFile(path, dpi, stamp, digest(path), sizes)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The document of pypdfium2 while the block runs; see ``open_pdf`` for what is raised."""
    try:
        import pypdfium2
    except ImportError:
        hint = "pip install 'vlft[pdf]', or write its pages as images"
        raise ConfigError("a PDF file needs pypdfium2", place=shown(path), hint=hint) from None
    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        found, hint = f"not a whole PDF file ({error})", "write it again, or name another file"
        if getattr(error, "err_code", None) == PASSWORD_WRONG:
            found, hint = "needs a password", "write a copy without one"
        raise DataError(found, place=shown(path), hint=hint) from None
    try:
        yield document
    finally:
        document.close()


@contextmanager
def _page_errors(path: Path, page: int) -> Iterator[None]:
    """Turns the errors of pypdfium2 into a DataError that names the page."""
    import pypdfium2

    try:
        yield
    except pypdfium2.PdfiumError as error:
        place, hint = _place(path, page), "write the file again, or leave it out"
        raise DataError(f"cannot be read ({error})", place=place, hint=hint) from None


def _place(path: Path, page: int) -> str:
    return f"{shown(path)}, page {page + 1}"


def _size(document: Any, page: int, dpi: int, path: Path) -> tuple[int, int]:
    """(width, height) of a page in pixels, as pypdfium2 rounds it.

    Raises:
        DataError: they are too many, or the page cannot be read.
    """
    with _page_errors(path, page):
        sides = document.get_page_size(page)
    width, height = (math.ceil(side * (dpi / POINTS)) for side in sides)
    if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
        found = f"{width:,} x {height:,} pixels at {dpi} dpi"
        hint = f"at most {MOST_PIXELS:,} pixels are read: lower --pdf-dpi"
        raise DataError(found, place=_place(path, page), hint=hint)
    return width, height


def _draw(document: Any, number: int, dpi: int, target: Path) -> None:
    """Writes the image of a page, whole or not at all."""
    page = document[number]
    try:
        image = page.render(scale=dpi / POINTS).to_pil()
    finally:
        page.close()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Another process may be writing the same page.
    descriptor, part = tempfile.mkstemp(dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            image.convert("RGB").save(file, format="PNG", compress_level=1)
        Path(part).replace(target)
    finally:
        Path(part).unlink(missing_ok=True)


def _version() -> str:
    from pypdfium2 import PYPDFIUM_INFO

    return str(PYPDFIUM_INFO)
