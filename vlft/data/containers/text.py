"""Data files of text: opened, unpacked, and refused by what their first bytes are."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from vlft.data.containers.unpack import unpack
from vlft.data.embedded import LONGEST_TEXT
from vlft.data.records import BOM
from vlft.errors import DataError, shown

if TYPE_CHECKING:
    from pathlib import Path

GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
CHUNK = 2**20
# The first bytes of what is no text, what it is, and what to do.
MARKS = (
    (GZIP, "compressed with gzip", "add .gz to its name, or unpack it with gunzip"),
    (b"\xff\xfe", "UTF-16 text", "save the file as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save the file as UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the data itself: git lfs pull"),
    (PARQUET, "a parquet file", "let its name end in .parquet"),
    (b"PK\x03\x04", "a zip archive or an Excel file", "unpack it, or save it as CSV UTF-8"),
)
PAGES = (b"<!doctype", b"<html")


def read_text(path: Path) -> str:
    """The text of a file, unpacked if its name ends in .gz.

    Raises:
        DataError: it is missing, is no regular file, or is no UTF-8 text.
    """
    data = read_bytes(path)
    if b"\0" in data[:256]:
        found = "found NUL bytes, as UTF-16 text has them"
        raise DataError(found, place=shown(path), hint="save the file as UTF-8")
    try:
        return data.decode("utf-8").lstrip(BOM)
    except UnicodeDecodeError as error:
        found = f"not UTF-8 (byte {error.start})"
        raise DataError(found, place=shown(path), hint="save the file as UTF-8") from None


def read_bytes(path: Path, expected: bytes = b"") -> bytes:
    """The bytes of a file, unpacked if its name ends in .gz.

    Args:
        path: the file.
        expected: what its first bytes may be, of those in MARKS.

    Raises:
        DataError: it is missing, is no regular file, or is something else by its first bytes.
    """
    place = shown(path)
    try:
        if path.exists() and not path.is_file():
            raise DataError("not a regular file", place=place, hint="name a data file")
        _check_texts(path, place)
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError("no such file", place=place, hint="check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot be read ({reason})", place=place, hint="check the path") from None
    if path.name.lower().endswith(".gz"):
        data = _unpacked(data, place)
    for mark, found, hint in MARKS:
        if data.startswith(mark) and mark != expected:
            raise DataError(f"found {found}", place=place, hint=hint)
    if data[:64].lstrip().lower().startswith(PAGES):
        hint = "download the file that the page shows or links to"
        raise DataError("found an HTML page", place=place, hint=hint)
    return data


def _check_texts(path: Path, place: str) -> None:
    """Raises DataError if a JSON file holds a text that is too long for an embedded image.

    Only what lies between two quotes is measured, chunk by chunk, so that a file that would not fit
    the memory is refused before it is read.
    """
    if path.stat().st_size <= LONGEST_TEXT:
        return
    line, length = 1, 0
    with path.open("rb") as file:
        chunk = file.read(CHUNK)
        if not chunk.lstrip(BOM.encode() + b" \t\r\n").startswith((b"{", b"[")):
            return
        while chunk:
            first = chunk.find(b'"')
            if length + (first if first >= 0 else len(chunk)) > LONGEST_TEXT:
                found = f"a text of more than {LONGEST_TEXT // 2**20} MiB"
                hint = "write an image as a file, and name its path"
                raise DataError(found, place=f"{place}:{line}", hint=hint)
            line += chunk.count(b"\n")
            length = length + len(chunk) if first < 0 else len(chunk) - 1 - chunk.rfind(b'"')
            chunk = file.read(CHUNK)


def _unpacked(data: bytes, place: str) -> bytes:
    if not data.startswith(GZIP):
        hint = "leave .gz out of its name"
        raise DataError("not compressed with gzip", place=place, hint=hint)
    whole = io.BytesIO()
    unpack(io.BytesIO(data), whole, len(data), place)
    return whole.getvalue()
