"""A folder of safetensors files, each whole or absent, with a checksum of every tensor.

    <folder>/<random>.safetensors     tensors by name; a CRC-32 of each in the file's metadata

A file is written under another name, flushed and renamed. Several processes may write into one
folder: their files have different names, and a tensor that two of them hold is the same in both.
"""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor

from vlft.errors import DataError, VlftError, shown
from vlft.files import open_tensors, save_tensors

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

SUFFIX = ".safetensors"
# Number, size and time of the last change of a file.
State = tuple[int, int, int]


class Shards(Mapping[str, Tensor]):
    """Tensors by name, mapped from files; one is compared with its checksum at its first use.

    At the start of a run this would read all files: those of 10,000 images can have 20 GB.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        # Name -> its file and its checksum, until it is used.
        self._unchecked: dict[str, tuple[Path, str | None]] = {}

    def add(self, path: Path, wanted: Collection[str]) -> None:
        """Maps the wanted tensors of a file, unless another file has them.

        Raises:
            SafetensorError: the file is damaged.
            OSError: it cannot be read.
        """
        tensors: dict[str, Tensor] = {}
        with open_tensors(path) as file:
            sums = file.metadata() or {}
            for name in set(wanted).intersection(file.keys()) - self._tensors.keys():
                tensors[name] = file.get_tensor(name)
        self._unchecked |= {name: (path, sums.get(name)) for name in tensors}
        self._tensors |= tensors

    def __getitem__(self, name: str) -> Tensor:
        """A tensor.

        Raises:
            DataError: its bytes have changed. Its file is removed, so that a later run encodes
                again what the file held.
        """
        tensor = self._tensors[name]
        path, expected = self._unchecked.get(name, (None, None))
        if path is not None and str(_checksum(tensor)) != expected:
            _rescue(path)
            hint = "start again, or go on with vlft sft --resume RUN: it is encoded again"
            raise DataError("features with changed bytes", place=shown(path), hint=hint)
        self._unchecked.pop(name, None)
        return tensor

    def __contains__(self, name: object) -> bool:
        # Mapping's own would get the tensor, and so read it.
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)


def read_shards(folder: Path, wanted: Collection[str]) -> tuple[Shards, list[str]]:
    """The wanted tensors in a folder, and what is wrong with damaged files, which are removed."""
    found = Shards()
    problems: list[str] = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        if not path.is_file():
            problems.append(f"{path.name}: not a regular file")
            continue
        try:
            found.add(path, wanted)
        except (SafetensorError, OSError, ValueError) as error:
            problems.append(f"{path.name}: {error}")
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


def _rescue(path: Path) -> None:
    """Writes the intact tensors of a damaged file to a new one, and removes it."""
    try:
        with open_tensors(path) as file:
            sums = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        good = {n: t for n, t in tensors.items() if sums.get(n) == str(_checksum(t))}
        if good:
            write_shard(path.parent, good)
    except (SafetensorError, OSError, ValueError, VlftError):
        # They are encoded again, too.
        pass
    path.unlink(missing_ok=True)


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a tensor."""
    data: memoryview = tensor.contiguous().view(torch.uint8).numpy().data
    return zlib.crc32(data)
