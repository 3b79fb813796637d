"""Digests of a model's weights and small files, which tell it from others of the same sizes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from vlft.checkpoints.export import canonical_name
from vlft.checkpoints.small_files import PROCESSOR_FILES, TOKENIZER_FILES
from vlft.checkpoints.weights import read_tensors
from vlft.errors import CheckpointError
from vlft.files import digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from vlft.checkpoints.locate import ModelFolder
    from vlft.families.keymap import Match

# In the metadata of an adapter that vlft writes: the digest of its base's weights.
BASE = "vlft_base"
# Raised whenever the same weights would get another digest.
_VERSION = "1"
# Most numbers that are hashed: a smaller model is read whole, of a larger one parts of each tensor.
_NUMBERS = 2**24


def weights_digest(folder: ModelFolder) -> str:
    """A digest of the weights that modules use.

    It is the same in both layouts, however the weights are divided into files, and in any data type
    that holds them exactly. Of a large model the start, middle and end of each tensor are read.
    """
    tensors = sorted(_pieces(folder), key=lambda item: item[0])
    whole = sum(tensor.numel() for _, tensor in tensors) <= _NUMBERS
    share = max(64, _NUMBERS // (3 * max(1, len(tensors))))
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.reshape(-1)
        middle = (len(flat) - share) // 2
        parts = [flat[:share], flat[middle : middle + share], flat[-share:]]
        for part in [flat] if whole or len(flat) <= 3 * share else parts:
            found.update(part.float().numpy().tobytes())
    return f"{_VERSION}:{found.hexdigest()}"


def is_other(recorded: str, found: str) -> bool:
    """Whether two digests are of different weights; False if a version makes them incomparable."""
    return recorded.startswith(f"{_VERSION}:") and recorded != found


def small_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each small file that the output depends on, by file name."""
    names = ("config.json", *TOKENIZER_FILES, *PROCESSOR_FILES)
    return {name: digest(folder / name) for name in names if (folder / name).is_file()}


def _pieces(folder: ModelFolder) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, memory-mapped, in pieces that are the same for both layouts.

    These are the tensors of transformers' layout, but each expert for itself.
    """
    keys = folder.family.keys
    for name, tensor in read_tensors(folder.path):
        native = canonical_name(name)
        matches: list[Match] = []
        if folder.layout == "transformers":
            try:
                matches = keys.from_native(native, len(tensor))
            except CheckpointError:  # The authors' name, or one that loading refuses.
                matches = []
        if matches and matches[0].change == "stack":
            yield from ((match.original, match.place_in(tensor)) for match in matches)
        elif matches:
            yield native, tensor
        elif not keys.is_unused(name):
            original = keys.from_original(name)
            if original is None or original.change == "stack":
                yield name, tensor
            else:
                yield from zip(original.native, original.to_native(tensor), strict=True)
