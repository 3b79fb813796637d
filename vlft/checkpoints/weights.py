"""Weight files -> tensors, one at a time; no code of a file is ever run."""

from __future__ import annotations

import pickle
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from vlft import console
from vlft.errors import CheckpointError, shown
from vlft.files import open_regular, open_tensors, read_object
from vlft.schema import TEXT, Schema, table

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

_INDEX_SCHEMA: Schema = {"weight_map": table(TEXT)}


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder."""
    sets = _weight_sets(folder)
    if not sets:
        raise CheckpointError(
            f"no weights; looked for {', '.join(_WHOLE_SETS)}",
            place=shown(folder),
            hint="download the whole model",
        )
    return _listed(sets[0]) if sets[0].suffix == ".json" else [sets[0]]


def _weight_sets(folder: Path) -> list[Path]:
    return [folder / name for name in _WHOLE_SETS if (folder / name).exists()]


def _listed(index: Path) -> list[Path]:
    """The files that an index names.

    Raises:
        CheckpointError: one is missing, or the index and the files contradict each other.
    """
    weight_map = read_object(index, _INDEX_SCHEMA).get("weight_map") or {}
    files = {file: index.parent / file for file in weight_map.values()}
    missing = [file for file, path in files.items() if not path.is_file()]
    outside = [file for file in files if Path(file).name != file]
    if outside or missing or not files:
        found = f"names {outside[0]!r}, outside of the folder" if outside else "names no file"
        if missing and not outside:
            found = f"names {', '.join(missing[:3])}, which is missing"
        raise CheckpointError(found, place=shown(index), hint="download the model again")
    if index.name.startswith("model."):
        owners: dict[str, str] = {}
        for file, path in files.items():
            for name in tensor_names(path):
                if weight_map.get(name, file) != file or name in owners:
                    other = owners.get(name) or weight_map[name]
                    found = f"{name} is in {file} and, as the index says, in {other}"
                    raise CheckpointError(found, place=shown(index), hint="download it again")
                owners[name] = file
        if absent := [name for name in weight_map if name not in owners]:
            found = f"{', '.join(absent[:3])} is not in {weight_map[absent[0]]}, which it names"
            raise CheckpointError(found, place=shown(index), hint="download the model again")
    return list(files.values())


def tensor_names(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file.

    Raises:
        CheckpointError: it is damaged.
    """
    with _opened(path) as file:
        return list(file.keys())


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
        read = _read_bin if path.suffix == ".bin" else read_safetensors
        yield from read(path, wanted)


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file; none if there is no whole header."""
    try:
        with open_tensors(path) as file:
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
            with _opened(path) as file:
                names = file.keys()
                total += sum(prod(file.get_slice(name).get_shape()) for name in names)
    return total


def read_safetensors(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of a file, of those names that are wanted.

    Raises:
        CheckpointError: the file is damaged.
    """
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            if wanted(name):
                yield name, file.get_tensor(name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; damage found while the block reads it is an error that names it."""
    try:
        with open_tensors(path) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"damaged: {error}", place=shown(path), hint="download the file again"
        ) from None


def _read_bin(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    hint = "use a safetensors file, or download the file again"
    try:
        open_regular(path).close()
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise CheckpointError(
            f"holds more than weights, or is damaged; weights only are read ({reason})",
            place=shown(path),
            hint=hint,
        ) from None
    if not isinstance(tensors, dict):
        raise CheckpointError("holds no table of weights", place=shown(path), hint=hint)
    for name, tensor in tensors.items():
        if isinstance(name, str) and isinstance(tensor, Tensor) and wanted(name):
            yield name, tensor
