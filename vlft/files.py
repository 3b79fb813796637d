"""Reading JSON with errors that name the file, hashing files and writing tensors."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from vlft.errors import CheckpointError, shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


def read_object_if_there(path: Path) -> dict[str, Any]:
    """As ``read_object``, but an empty object if there is no such file."""
    return read_object(path) if path.is_file() else {}


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, is no JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"no {path.name}", place=shown(path.parent), hint="name the folder that holds it"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"cannot be read: {error}", place=shown(path), hint="write or download it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"found {type(value).__name__}, an object is allowed",
            place=shown(path),
            hint="write or download it again",
        )
    return value


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file whose permissions follow the user's umask."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    # save_file puts a new file in its place, which only the user can read.
    save_file(dict(tensors), path, metadata=dict(metadata or {"format": "pt"}))
    path.chmod(mode & 0o777)
