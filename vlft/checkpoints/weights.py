"""Weight files -> tensors, one at a time; no code of a file is ever run."""

from __future__ import annotations

import pickle
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlft.errors import CheckpointError
from vlft.files import read_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# In the metadata of weights that vlft writes: digests of the adapters that were merged into them.
MERGED = "vlft_adapters"
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, by its index if it has one."""
    for name in _INDEX_FILES:
        if (folder / name).is_file():
            table = read_object(folder / name).get("weight_map")
            if not isinstance(table, dict):
                raise CheckpointError("holds no weight_map", place=str(folder / name))
            names = dict.fromkeys(table.values())
            outside = [file for file in names if Path(file).name != file]
            if outside:
                raise CheckpointError(
                    f"the index names {outside[0]!r}, outside of the folder", place=str(folder)
                )
            files = [folder / file for file in names]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise CheckpointError(
                    f"{name} names {', '.join(missing[:3])}, which is missing",
                    place=str(folder),
                    hint="download the model again",
                )
            return files
    for name in _SINGLE_FILES:
        if (folder / name).is_file():
            return [folder / name]
    raise CheckpointError(
        f"no weights; looked for {', '.join(_SINGLE_FILES)} and their indices",
        place=str(folder),
        hint="download the whole model",
    )


def read_tensors(
    folder: Path, wanted: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, of the wanted names, in a model's files' order; one in memory at a time."""
    for path in _weight_files(folder):
        read = _read_bin if path.suffix == ".bin" else _read_safetensors
        yield from read(path, wanted)


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file; none if there is no whole header."""
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError):
        return {}
    return found


def merged_adapters(folder: Path) -> list[str]:
    """SHA-256 of the files of the adapters that vlft has merged into a model."""
    file = _weight_files(folder)[0]
    return read_metadata(file).get(MERGED, "").split() if file.suffix != ".bin" else []


def count_numbers(folder: Path) -> int:
    """Number of parameters in the weight files of a folder; .bin files are taken as 16 bit."""
    total = 0
    for path in _weight_files(folder):
        if path.suffix == ".bin":
            total += path.stat().st_size // 2
        else:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                total += sum(prod(file.get_slice(name).get_shape()) for name in names)
    return total


def _read_safetensors(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if wanted(name):
                    yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(
            f"damaged: {error}", place=str(path), hint="download the file again"
        ) from None


def _read_bin(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(
            f"holds more than weights, or is damaged; weights only are read ({reason})",
            place=str(path),
            hint="use a safetensors file, or download the file again",
        ) from None
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and wanted(name):
            yield name, tensor
