"""Transformers' class -> a model folder in either layout, shard by shard."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

from vlft.checkpoints.weights import read_tensors
from vlft.config import MergeLoraConfig
from vlft.errors import ConfigError
from vlft.families.base import keeps_dtype
from vlft.families.processor import template_source
from vlft.files import read_object

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from vlft.checkpoints.locate import ModelFolder
    from vlft.data.encode import ChatFormat

# Tensors of the authors' layout that no module uses, in a folder of transformers' layout.
UNUSED_FILE = "unused.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "generation_config.json")


def export_model(
    model: PreTrainedModel,
    base: ModelFolder,
    folder: Path,
    chat: ChatFormat,
    *,
    layout: str,
    dtype: torch.dtype | None,
    max_shard_size: str = MergeLoraConfig.max_shard_size,
) -> None:
    """Writes a model that loads like its base did.

    Args:
        model: not quantised, no adapter left in it.
        base: where the small files, and the tensors that no module uses, come from.
        folder: exists and is empty.
        chat: of the base; for the token ids in the files.
        layout: original or transformers.
        dtype: of the written tensors; None keeps each as it is in memory.
        max_shard_size: of one weight file, e.g. ``5GB``.
    """
    state = _original_state(model, base) if layout == "original" else _native_state(model)
    dtypes = {
        key: tensor.dtype if dtype is None or keeps_dtype(key, base.family) else dtype
        for key, tensor in state.items()
    }
    # Cut by what is written: of these dtypes, and each a tensor of its own.
    written = {
        key: torch.empty(tensor.shape, dtype=dtypes[key], device="meta")
        for key, tensor in state.items()
    }
    shards = split_torch_state_dict_into_shards(
        written, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for name, members in shards.filename_to_tensors.items():
        tensors = {key: _ready(state[key], dtypes[key]) for key in members}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if layout != "original":
        unused = dict(_unused_tensors(base))
        if unused:
            save_file(unused, folder / UNUSED_FILE, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)
    _write_small_files(model, base, folder, chat, layout, _stated_dtype(model, dtype))


def check_layout(base: ModelFolder, layout: str) -> None:
    """Raises ConfigError if the family has no such layout."""
    if layout == "transformers" and not base.family.has_transformers_layout:
        raise ConfigError(
            f"transformers has no class for {base.family.title}",
            place="--format transformers",
            hint="use --format original, which vlft, the authors' code and vLLM read",
        )


def canonical_name(name: str) -> str:
    """A module's tensor name as transformers writes it, whatever its release nests."""
    return re.sub(r"^model\.vision_model\.vision_model\.", "model.vision_model.", name)


def _native_state(model: PreTrainedModel) -> dict[str, Tensor]:
    state = {canonical_name(name): tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def _original_state(model: PreTrainedModel, base: ModelFolder) -> dict[str, Tensor]:
    """The tensors under the authors' names; those that no module uses come from the base."""
    keys = base.family.keys
    native = _native_state(model)
    state: dict[str, Tensor] = {}
    for name, tensor in native.items():
        for match in keys.from_native(name, len(tensor)):
            if match.original not in state:
                state[match.original] = match.to_original([native[part] for part in match.native])
    state.update(_unused_tensors(base))
    return dict(sorted(state.items()))


def _unused_tensors(base: ModelFolder) -> Iterator[tuple[str, Tensor]]:
    """What the authors' files hold and no module uses; transformers' layout has it beside."""
    if base.layout == "original":
        yield from read_tensors(base.path, base.family.keys.is_unused)
    elif (base.path / UNUSED_FILE).is_file():
        yield from load_file(base.path / UNUSED_FILE).items()


def _ready(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def _stated_dtype(model: PreTrainedModel, dtype: torch.dtype | None) -> str:
    return str(dtype or model.dtype).removeprefix("torch.")


def _write_small_files(
    model: PreTrainedModel,
    base: ModelFolder,
    folder: Path,
    chat: ChatFormat,
    layout: str,
    dtype: str,
) -> None:
    """Configuration and tokenizer: the base's own files where the layout is the same."""
    _copy(base, folder, TOKENIZER_FILES)
    if layout == base.layout:
        _copy(base, folder, PROCESSOR_FILES)
        config = {key: value for key, value in base.config.items() if key != "dtype"}
        _write_json(folder / "config.json", {**config, "torch_dtype": dtype})
    else:
        _write_other_layout(model, base, folder, chat, layout, dtype)
    written = read_object(folder / "config.json")
    if base.family.roles(folder, written) != chat.roles:
        # What told them was of the base's files; this tells them in any.
        (folder / "chat_template.jinja").write_text(chat_template(chat), "utf-8")


def chat_template(chat: ChatFormat) -> str:
    """Janus' chat template for transformers, with this checkpoint's roles."""
    text = template_source("janus_chat.jinja")
    user, assistant = chat.roles
    text = text.replace('"USER"', json.dumps(user)).replace('"ASSISTANT"', json.dumps(assistant))
    return text.replace("ASSISTANT:", f"{assistant}:").replace("SYSTEM", chat.system_prompt)


def _write_other_layout(
    model: PreTrainedModel,
    base: ModelFolder,
    folder: Path,
    chat: ChatFormat,
    layout: str,
    dtype: str,
) -> None:
    native, other = base.native_config(), base.family.transformers_layout
    if other is None:
        raise ValueError(f"{base.family.title} has one layout")
    if layout == "original":
        _write_json(folder / "config.json", other.original_config(native, dtype))
    else:
        config = {**model.config.to_dict(), "dtype": dtype}
        config["architectures"] = [type(model).__name__]
        _write_json(folder / "config.json", config)
        generation = {"bos_token_id": chat.bos_id, "eos_token_id": chat.eos_id}
        _write_json(folder / "generation_config.json", {**generation, "pad_token_id": chat.pad_id})
    pixels, processor = other.processor_files(base.path, base.config, native, layout)
    _write_json(folder / "preprocessor_config.json", pixels)
    _write_json(folder / "processor_config.json", processor)


def _copy(base: ModelFolder, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if (base.path / name).is_file():
            shutil.copyfile(base.path / name, folder / name)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
