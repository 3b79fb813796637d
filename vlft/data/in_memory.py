"""Records that are given through Python, kept as a data file, so that a run can be resumed.

datasets/<SHA-256>.jsonl     the records, one a line
datasets/<SHA-256>.folder    where their relative image paths start
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.data.embedded import store
from vlft.data.references import is_in_memory, png_of
from vlft.errors import DataError
from vlft.files import cache_folder, write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FOLDER = ".folder"


def keep_records(rows: Sequence[Mapping[str, Any]]) -> str:
    """The path of a file with these records; images among them are stored as files.

    Raises:
        DataError: a value is none that JSON has, and no image.
    """
    lines = []
    for number, row in enumerate(rows, start=1):
        try:
            lines.append(json.dumps(_plain(row)) + "\n")
        except (TypeError, ValueError, RecursionError) as error:
            hint = "give texts, numbers, lists, objects, bytes and images of Pillow"
            raise DataError(str(error), place=f"record {number}", hint=hint) from None
    text, here = "".join(lines), str(Path.cwd())
    name = hashlib.sha256(f"{here}\n{text}".encode()).hexdigest()
    path = cache_folder("datasets") / f"{name}.jsonl"
    write_whole(path.with_suffix(FOLDER), here)
    write_whole(path, text)
    return str(path)


def is_kept(path: Path) -> bool:
    """Whether a data file is one of ``keep_records``, whose name means nothing to a user."""
    return path.parent == cache_folder("datasets")


def image_folder(path: Path) -> Path:
    """Where the relative image paths of a data file start."""
    if is_kept(path):
        return Path(path.with_suffix(FOLDER).read_text("utf-8"))
    return path if path.is_dir() else path.parent


def _plain(value: Any) -> Any:
    """The value as JSON has it, with the path of a stored file in the place of each image."""
    if isinstance(value, bytes):
        return str(store(value))
    if is_in_memory(value):
        return str(store(png_of(value)))
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return str(store(value["bytes"]))
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
