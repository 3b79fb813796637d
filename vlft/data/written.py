"""Data files that vlft writes, and which of the files that are there they may replace."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from vlft.errors import ConfigError, shown
from vlft.files import open_regular, same_file

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

# Of a first line that is read to know it.
_LONGEST = 2**24


def check_target(
    path: Path, inputs: Iterable[Path], keys: Collection[str], *, overwrite: bool, flag: str
) -> None:
    """Raises ConfigError unless nothing is there, or an earlier file that may be replaced.

    Args:
        path: of the new file.
        inputs: files that are read.
        keys: of each object that vlft writes into such a file, besides ``objects``.
        overwrite: whether an earlier one may be replaced.
        flag: names the path in messages.
    """
    place = f"{flag} {shown(path)}"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ConfigError("not a regular file", place=place, hint="name another file")
    if any(same_file(path, other) for other in inputs):
        raise ConfigError("is read as data", place=place, hint="name another file")
    if path.exists() and not overwrite:
        hint = "name another file, or add --overwrite"
        raise ConfigError("the file is there already", place=place, hint=hint)
    if path.exists() and not _has_keys(path, keys):
        hint = "name another file, or remove it yourself"
        raise ConfigError("vlft has not written this", place=place, hint=hint)


def _has_keys(path: Path, keys: Collection[str]) -> bool:
    """Whether the first line of a file is an object with these keys."""
    with open_regular(path) as file:
        line = file.readline(_LONGEST)
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() - {"objects"} == set(keys)
