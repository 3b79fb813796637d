"""Images inside of data files, kept as files of their own, so that they are read like others."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from vlft.data.image_cache import LARGEST
from vlft.errors import DataError, shown
from vlft.files import cache_folder

# Of base64, with some white space.
LONGEST_TEXT = LARGEST * 3 // 2


def check_size(size: int) -> None:
    """Raises DataError if an embedded image has too many bytes."""
    if size > LARGEST:
        raise DataError(
            f"an embedded image of {size / 2**20:,.0f} MiB, at most {LARGEST // 2**20} are read",
            hint="make it smaller, or write it as a file and name its path",
        )


def store(data: bytes) -> Path:
    """The file that holds these bytes, named by their SHA-256.

    Raises:
        DataError: it is too large, or cannot be written.
    """
    check_size(len(data))
    digest = hashlib.sha256(data).hexdigest()
    path = cache_folder("images") / digest[:2] / digest
    if path.is_file() and path.stat().st_size == len(data):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be writing the same file.
        descriptor, part = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(part).replace(path)
    except OSError as error:
        found = f"an embedded image cannot be written ({error.strerror or error})"
        hint = "make room there, or set XDG_CACHE_HOME to another folder"
        raise DataError(found, place=shown(path), hint=hint) from None
    return path
