"""PDF files -> an image file of each page, by pypdfium2, which the extra vlft[pdf] installs.

images/pages/<SHA-256>.png   in the cache: a page, named by the file's bytes, its number and the dpi
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from vlft.console import tracked
from vlft.data.image_cache import NAME
from vlft.data.images import LONGEST_SIDE, MOST_PIXELS
from vlft.errors import ConfigError, DataError, shown
from vlft.files import cache_folder, digest, open_regular

POINTS = 72  # per inch: the unit of a page's size
START = b"%PDF-"
# Where readers of PDF look for it: other bytes may stand before.
HEAD = 1024
PASSWORD_WRONG = 4  # FPDF_ERR_PASSWORD


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


def render_pages(path: Path, dpi: int) -> list[Path]:
    """An image file of each page.

    Args:
        path: of the PDF file.
        dpi: dots per inch.

    Raises:
        ConfigError: pypdfium2 is not installed.
        DataError: the file is damaged, needs a password or has no pages, or a page is too large.
    """
    try:
        import pypdfium2
    except ImportError:
        hint = "pip install 'vlft[pdf]', or write its pages as images"
        raise ConfigError("a PDF file needs pypdfium2", place=shown(path), hint=hint) from None
    of_file = digest(path)
    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        found, hint = f"not a whole PDF file ({error})", "write it again, or name another file"
        if getattr(error, "err_code", None) == PASSWORD_WRONG:
            found, hint = "needs a password", "write a copy without one"
        raise DataError(found, place=shown(path), hint=hint) from None
    try:
        if not len(document):
            raise DataError("has no pages", place=shown(path), hint="name another file")
        numbers = tracked(range(len(document)), f"pages of {path.name}", len(document))
        return [_page(document, number, dpi, path, of_file) for number in numbers]
    finally:
        document.close()


def _page(document: Any, number: int, dpi: int, path: Path, of_file: str) -> Path:
    """The image of a page, rendered unless it is in the cache."""
    import pypdfium2

    name = hashlib.sha256(f"{of_file} {number} {dpi} {_version()}".encode()).hexdigest()
    target = cache_folder(NAME) / "pages" / f"{name}.png"
    if target.is_file():
        return target
    place = f"{shown(path)}, page {number + 1}"
    try:
        page = document[number]
        width, height = (side * dpi / POINTS for side in page.get_size())
        if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
            found = f"{width:,.0f} x {height:,.0f} pixels at {dpi} dpi"
            hint = f"at most {MOST_PIXELS:,} pixels are read: lower --pdf-dpi"
            raise DataError(found, place=place, hint=hint)
        image = page.render(scale=dpi / POINTS).to_pil()
        page.close()
    except pypdfium2.PdfiumError as error:
        hint = "write the file again, or leave it out"
        raise DataError(f"cannot be read ({error})", place=place, hint=hint) from None
    target.parent.mkdir(parents=True, exist_ok=True)
    # Another process may be writing the same page.
    descriptor, part = tempfile.mkstemp(dir=target.parent)
    with os.fdopen(descriptor, "wb") as file:
        image.convert("RGB").save(file, format="PNG", compress_level=1)
    Path(part).replace(target)
    return target


def _version() -> str:
    from pypdfium2 import PYPDFIUM_INFO

    return str(PYPDFIUM_INFO)
