"""Weight files -> tensors, one at a time; no code of a file is ever run."""

from __future__ import annotations

import pickle
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlft import console
from vlft.errors import CheckpointError, shown
from vlft.files import read_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# In the metadata of weights that vlft writes: digests of the adapters that were merged into them.
MERGED = "vlft_adapters"
# Files that hold, or list, a whole set of weights. The first that is there is read, as transformers
# does.
_WHOLE_SETS = (
    "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder."""
    sets = _weight_sets(folder)
    if not sets:
        raise CheckpointError(
            f"no weights; looked for {', '.join(_WHOLE_SETS)}",
            place=str(folder),
            hint="download the whole model",
        )
    return _listed(sets[0]) if sets[0].suffix == ".json" else [sets[0]]


def _weight_sets(folder: Path) -> list[Path]:
    return [folder / name for name in _WHOLE_SETS if (folder / name).is_file()]


def _listed(index: Path) -> list[Path]:
    """The files that an index names."""
    table = read_object(index).get("weight_map")
    if not isinstance(table, dict):
        raise CheckpointError("holds no weight_map", place=str(index))
    names = dict.fromkeys(table.values())
    outside = [file for file in names if Path(file).name != file]
    if outside:
        raise CheckpointError(
            f"the index names {outside[0]!r}, outside of the folder", place=str(index.parent)
        )
    files = [index.with_name(file) for file in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{index.name} names {', '.join(missing[:3])}, which is missing",
            place=str(index.parent),
            hint="download the model again",
        )
    return files


def warn_of_other_weights(folder: Path) -> None:
    """Warns if a folder has a second set of weights, which is not read."""
    sets = [path.name for path in _weight_sets(folder)]
    if len(sets) > 1:
        console.warn(
            f"{shown(folder)}: several sets of weights; {sets[0]} is read, "
            f"{', '.join(sets[1:])} is left aside"
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
