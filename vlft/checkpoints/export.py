"""Model in memory -> model folder in either layout, shard by shard.

The folder is never one with foreign files, and never half written.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from vlft.checkpoints.small_files import write_json, write_small_files
from vlft.checkpoints.weights import MERGED, merged_adapters, read_safetensors, read_tensors
from vlft.config import MergeLoraConfig
from vlft.errors import ConfigError
from vlft.families.base import keeps_dtype
from vlft.files import save_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from vlft.checkpoints.locate import ModelFolder

# Where transformers' layout keeps tensors of the authors' layout that no module uses.
_UNUSED_FILE = "unused.safetensors"


def export_model(
    model: PreTrainedModel,
    base: ModelFolder,
    folder: Path,
    *,
    layout: str,
    dtype: torch.dtype | None,
    max_shard_size: str = MergeLoraConfig.max_shard_size,
    merged: str = "",
) -> None:
    """Writes a model folder that loads as the base does.

    Args:
        model: not quantised, adapters merged or removed.
        base: source of the small files and of the tensors that no module uses.
        folder: exists and is empty.
        layout: original or transformers.
        dtype: of the written tensors; None keeps that of each tensor.
        max_shard_size: of a weight file, e.g. ``5GB``.
        merged: SHA-256 of the adapter that was merged into the model, if one was.

    Raises:
        CheckpointError: the layout has no field for a setting of the model; no weights are written.
    """
    state = _original_state(model, base) if layout == "original" else _native_state(model)
    # Shards are sized by the written dtypes; tensors that share storage are written one by one.
    written: dict[str, Tensor] = {}
    for key, tensor in state.items():
        kept = tensor.dtype if dtype is None or keeps_dtype(key, base.family) else dtype
        written[key] = torch.empty(tensor.shape, dtype=kept, device="meta")
    write_small_files(model, base, folder, layout, _commonest_dtype(written))
    shards = split_torch_state_dict_into_shards(
        written, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    adapters = [*merged_adapters(base.path), *merged.split()]
    for name, members in shards.filename_to_tensors.items():
        tensors = {
            key: state[key].detach().to("cpu", written[key].dtype).contiguous() for key in members
        }
        save_tensors(tensors, folder / name, {"format": "pt", MERGED: " ".join(adapters)})
    if layout != "original" and (unused := _unused_tensors(base)):
        save_tensors(unused, folder / _UNUSED_FILE)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _commonest_dtype(tensors: Mapping[str, Tensor]) -> str:
    """The data type of most numbers, as config.json states it."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        numbers[tensor.dtype] += tensor.numel()
    return str(numbers.most_common(1)[0][0]).removeprefix("torch.")


def check_layout(base: ModelFolder, layout: str) -> None:
    """Raises ConfigError if the family has no such layout."""
    if layout == "transformers" and not base.family.has_transformers_layout:
        raise ConfigError(
            f"transformers has no class for {base.family.title}",
            place="--format transformers",
            hint="use --format original, which vlft, the authors' code and vLLM read",
        )


def canonical_name(name: str) -> str:
    """The name under which transformers writes a tensor; the nesting varies with its release."""
    return re.sub(r"^model\.vision_model\.vision_model\.", "model.vision_model.", name)


def nested_name(name: str) -> str:
    """The name of a tensor in the releases whose tower has one more level."""
    flat = canonical_name(name)
    return re.sub(r"^model\.vision_model\.", "model.vision_model.vision_model.", flat)


def _native_state(model: PreTrainedModel) -> dict[str, Tensor]:
    state = {canonical_name(name): tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def _original_state(model: PreTrainedModel, base: ModelFolder) -> dict[str, Tensor]:
    """The tensors under the authors' names, with those of the base that no module uses."""
    keys = base.family.keys
    native = _native_state(model)
    state: dict[str, Tensor] = {}
    for name, tensor in native.items():
        for match in keys.from_native(name, len(tensor)):
            if match.original not in state:
                state[match.original] = match.to_original([native[part] for part in match.native])
    state.update(_unused_tensors(base))
    return dict(sorted(state.items()))


def _unused_tensors(base: ModelFolder) -> dict[str, Tensor]:
    """The tensors of the base that no module uses."""
    if base.layout == "original":
        return dict(read_tensors(base.path, base.family.keys.is_unused))
    path = base.path / _UNUSED_FILE
    return dict(read_safetensors(path, lambda _: True)) if path.is_file() else {}
