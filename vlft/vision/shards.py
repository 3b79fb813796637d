"""A folder of safetensors files, each whole or absent, with a checksum of every tensor.

    <folder>/<random>.safetensors     tensors by name; a CRC-32 of each in the file's metadata

A file is written under another name, flushed and renamed. Several processes may write into one
folder: their files have different names, and a tensor that two of them hold is the same in both.
"""

from __future__ import annotations

import os
import secrets
import zlib
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor

from vlft.errors import VlftError
from vlft.files import open_tensors, save_tensors

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

SUFFIX = ".safetensors"
# Number, size and time of the last change of a file.
State = tuple[int, int, int]


def read_shards(folder: Path, wanted: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The wanted tensors in a folder, mapped from its files, and what is wrong with damaged files.

    Truncated files and tensors with a wrong checksum are left out. A damaged file is removed; its
    intact tensors are written to a new one.
    """
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        if not path.is_file():
            problems.append(f"{path.name}: not a regular file")
            continue
        try:
            tensors, wrong = _read(path, set(wanted) - found.keys())
        except (SafetensorError, OSError, ValueError) as error:
            problems.append(f"{path.name}: {error}")
            path.unlink(missing_ok=True)
            continue
        found.update(tensors)
        if wrong:
            problems.append(f"{path.name}: {len(wrong)} entries with changed bytes")
            if tensors:
                write_shard(folder, tensors)
            path.unlink(missing_ok=True)
    return found, problems


def states(folder: Path) -> dict[Path, State]:
    """What the files of a folder are now, before they are used."""
    return {path: state for path in folder.glob(f"*{SUFFIX}") if (state := _state(path))}


def changed_file(before: Mapping[Path, State]) -> Path | None:
    """A file that somebody has written to since then; reading beyond its new end would kill us.

    One that was removed or replaced stays mapped as it was.
    """
    for path, state in before.items():
        now = _state(path)
        if now is not None and now[0] == state[0] and now != state:
            return path
    return None


def _state(path: Path) -> State | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def write_shard(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Writes one file; returns its path.

    Raises:
        VlftError: the file cannot be written.
    """
    path = folder / f"{secrets.token_hex(8)}{SUFFIX}"
    part = path.with_suffix(".part")
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sums = {name: str(_checksum(tensor)) for name, tensor in ready.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(ready, part, sums)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(path)
    except OSError as error:
        raise VlftError(
            f"features could not be written ({error.strerror or error})",
            place=str(folder),
            hint="make room (vlft cache clear), or use --vision-cache memory",
        ) from error
    finally:
        if part.exists():
            part.unlink()
    return path


def _read(path: Path, wanted: set[str]) -> tuple[dict[str, Tensor], list[str]]:
    tensors: dict[str, Tensor] = {}
    wrong: list[str] = []
    with open_tensors(path) as file:
        sums = file.metadata() or {}
        for name in wanted.intersection(file.keys()):
            tensor = file.get_tensor(name)
            if sums.get(name) == str(_checksum(tensor)):
                tensors[name] = tensor
            else:
                wrong.append(name)
    return tensors, wrong


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a tensor."""
    data: memoryview = tensor.contiguous().view(torch.uint8).numpy().data
    return zlib.crc32(data)
