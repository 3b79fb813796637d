"""Data files of text: opened, unpacked, and refused by what their first bytes are."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from typing import TYPE_CHECKING, BinaryIO

from vlft.data.containers.unpack import unpack
from vlft.data.embedded import LONGEST_TEXT
from vlft.data.records import BOM
from vlft.errors import DataError, shown
from vlft.files import open_regular

if TYPE_CHECKING:
    from pathlib import Path

GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
CHUNK = 2**20
# Bytes at the start that tell what a file is.
HEAD = 256
# The first bytes of what is no text, what it is, and what to do.
MARKS = (
    (GZIP, "compressed with gzip", "add .gz to its name, or unpack it with gunzip"),
    (b"\xff\xfe", "UTF-16 text", "save the file as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save the file as UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the data itself: git lfs pull"),
    (PARQUET, "a parquet file", "let its name end in .parquet"),
    (b"PK\x03\x04", "a zip archive or an Excel file", "unpack it, or save it as CSV UTF-8"),
)
WHITE = f" \t\r\n\v\f{BOM}"
PAGES = (b"<!doctype", b"<html")


def open_text(path: Path) -> BinaryIO:
    """A file of text, open for reading bytes; unpacked if its name ends in .gz.

    Raises:
        DataError: it is missing, is no regular file, or is no UTF-8 text by its first bytes.
    """
    file = open_bytes(path)
    head = file.read(HEAD)
    file.seek(0)
    if b"\0" in head:
        file.close()
        found = "found NUL bytes, as UTF-16 text has them"
        raise DataError(found, place=shown(path), hint="save the file as UTF-8")
    return file


def is_blank(file: BinaryIO) -> bool:
    """Whether a file holds nothing but white space."""
    file.seek(0)
    while chunk := file.read(CHUNK):
        if chunk.decode("utf-8", "replace").strip(WHITE):
            return False
    return True


def open_bytes(path: Path, expected: bytes = b"") -> BinaryIO:
    """A file, open for reading; unpacked if its name ends in .gz.

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
        file: BinaryIO = open_regular(path)
    except FileNotFoundError:
        raise DataError("no such file", place=place, hint="check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot be read ({reason})", place=place, hint="check the path") from None
    with ExitStack() as opened:
        opened.enter_context(file)
        if path.name.lower().endswith(".gz"):
            file = opened.enter_context(_unpacked(file, place))
        _check_head(file.read(HEAD), place, expected)
        _check_texts(file, place)
        file.seek(0)
        opened.pop_all()
        return file


def _check_head(head: bytes, place: str, expected: bytes) -> None:
    """Raises DataError if the first bytes of a file are those of something else."""
    for mark, found, hint in MARKS:
        if head.startswith(mark) and mark != expected:
            raise DataError(f"found {found}", place=place, hint=hint)
    if head[:64].lstrip().lower().startswith(PAGES):
        hint = "download the file that the page shows or links to"
        raise DataError("found an HTML page", place=place, hint=hint)


def _check_texts(file: BinaryIO, place: str) -> None:
    """Raises DataError if a JSON file holds a text that is too long for an embedded image.

    Only what lies between two quotes is measured, chunk by chunk, so that a file that would not fit
    the memory is refused before it is read.
    """
    if file.seek(0, os.SEEK_END) <= LONGEST_TEXT:
        return
    file.seek(0)
    line, length = 1, 0
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


def _unpacked(file: BinaryIO, place: str) -> BinaryIO:
    """The bytes of a gzip file in a temporary one, as records are read in any order."""
    if file.read(len(GZIP)) != GZIP:
        hint = "leave .gz out of its name"
        raise DataError("not compressed with gzip", place=place, hint=hint)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    whole = tempfile.TemporaryFile()  # noqa: SIM115 (read as long as the records are)
    try:
        with file:
            unpack(file, whole, size, place)
    except OSError as error:
        whole.close()
        hint = "make room, or unpack it where there is room"
        found = f"cannot be unpacked ({error.strerror or error})"
        raise DataError(found, place=place, hint=hint) from None
    except DataError:
        whole.close()
        raise
    whole.seek(0)
    return whole
