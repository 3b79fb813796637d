"""Gzip files -> what they hold, unless that is far more than data ever is."""

from __future__ import annotations

import gzip
import zlib
from typing import TYPE_CHECKING, BinaryIO

from vlft.errors import DataError

if TYPE_CHECKING:
    from typing import IO

CHUNK = 2**20
# Text packs to a tenth, the same line over and over to a thousandth. A file may always become as
# large as the first of these, in bytes, and beyond that so many times its own size.
ALWAYS, TIMES = 2**28, 100


def unpack(packed: BinaryIO, whole: IO[bytes], size: int, place: str) -> None:
    """Writes what a gzip file holds, chunk by chunk.

    Args:
        packed: the file, open for reading.
        whole: where it is written to.
        size: of the packed file, in bytes.
        place: of the file, for messages.

    Raises:
        DataError: it is damaged, or holds too much.
    """
    most, written = max(ALWAYS, TIMES * size), 0
    try:
        with gzip.open(packed) as file:
            while chunk := file.read(CHUNK):
                written += len(chunk)
                if written > most:
                    found = f"{size:,} bytes hold more than {most:,}, which no data file does"
                    hint = "if it is one, unpack it with gunzip, and name the file that it holds"
                    raise DataError(found, place=place, hint=hint)
                whole.write(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        hint = "download or compress it again"
        raise DataError(f"damaged: {error}", place=place, hint=hint) from None
