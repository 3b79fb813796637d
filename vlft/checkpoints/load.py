"""Model folder -> transformers' class, tensor by tensor: peak memory is about one model.

The module is built without storage (meta device); each tensor of the files is renamed, brought to
its dtype and device, quantised if asked, and takes its place. What is missing, unexpected or of
the wrong shape is an error that names it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from vlft.checkpoints.quantize import (
    holds_quantized,
    mark_quantized,
    quantize_language,
    quantized_weight,
)
from vlft.checkpoints.weights import read_tensors
from vlft.errors import CheckpointError, ConfigError, shown
from vlft.families.base import keeps_dtype
from vlft.families.processor import config_errors
from vlft.models.adaptations import prepare_for_inference

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping

    from transformers import PreTrainedModel

    from vlft.checkpoints.locate import ModelFolder
    from vlft.families.keymap import Match

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Placement:
    """Where and how a model is held.

    Attributes:
        device: torch device.
        dtype: of all weights that are not quantised.
        quantize: none, nf4 or int8; of the LLM's linear layers.
        attn: sdpa, eager or flex.
    """

    device: torch.device
    dtype: torch.dtype
    quantize: str = "none"
    attn: str = "sdpa"


def resolve_placement(
    folder: ModelFolder, *, dtype: str, device: str, quantize: str, attn: str = "auto"
) -> Placement:
    """What ``auto`` means here: a GPU if there is one; float32 on the CPU, else the files' dtype.

    Raises:
        ConfigError: a GPU is asked for, or needed, and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "found no usable GPU", place="--device cuda", hint="use --device cpu or auto"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else _gpu_dtype(folder)
    if attn == "flex" and device == "cpu":
        raise ConfigError(
            "found flex; torch has no backward pass of it on the CPU",
            place="--attn",
            hint="use --attn auto",
        )
    return Placement(
        torch.device(device), DTYPES[dtype], quantize, "sdpa" if attn == "auto" else attn
    )


def load_model(
    folder: ModelFolder, placement: Placement, *, keep_dtypes: bool = False
) -> PreTrainedModel:
    """The model of a folder, in evaluation mode, no gradients required.

    Args:
        folder: of the model.
        placement: where and how it is held.
        keep_dtypes: hold each tensor as its file has it, whatever the placement says.

    Raises:
        CheckpointError: the files do not fit the class.
    """
    # FlexAttention is of the LLM alone: a tower has no mask.
    flex = placement.attn == "flex"
    model = empty_model(folder, "sdpa" if flex else placement.attn)
    if flex:
        language: Any = model.get_submodule(folder.family.parts.language)
        language.config._attn_implementation = "flex_attention"
    quantize_language(model, folder.family, placement.quantize, placement.dtype)
    expected = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in expected.items()}
    filled: set[str] = set()
    unexpected: list[str] = []
    wrong: list[str] = []
    for name, tensor in native_tensors(folder, shapes):
        if name not in expected:
            unexpected.append(name)
        elif shapes[name] != tensor.shape:
            wrong.append(f"{name} {tuple(tensor.shape)}, not {tuple(shapes[name])}")
        else:
            kept = keep_dtypes or keeps_dtype(name, folder.family)
            _place(model, name, tensor, placement.device, tensor.dtype if kept else placement.dtype)
            filled.add(name)
    if model.config.tie_word_embeddings:
        model.tie_weights()
        filled.add(f"{folder.family.parts.head}.weight")
    missing = [name for name in expected if name not in filled]
    _refuse(folder, missing, unexpected, wrong)
    if placement.quantize != "none":
        mark_quantized(model, placement.quantize)
    _move_buffers(model, placement.device)
    model.requires_grad_(False)
    model.name_or_path = folder.name
    return model.eval()


def empty_model(
    folder: ModelFolder, attn: str = "sdpa", *, image_token_id: int | None = None
) -> PreTrainedModel:
    """The module of a folder on the meta device: shapes and names, buffers real, no weights.

    Args:
        folder: of the model.
        attn: transformers' name of the attention implementation.
        image_token_id: see ModelFolder.native_config.
    """
    cls: Any = folder.family.model_class()
    try:
        config = cls.config_class(**folder.native_config(image_token_id))
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"a value that the model cannot have: {error}",
            place=shown(folder.path / "config.json"),
            hint="download the model again",
        ) from None
    with init_empty_weights(include_buffers=False), config_errors(folder.path, folder.family):
        model: PreTrainedModel = cls._from_config(config, attn_implementation=attn)
    prepare_for_inference(model)
    return model


def native_tensors(
    folder: ModelFolder, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """Every used tensor of a folder under its name in the model's class.

    Args:
        folder: of the model.
        shapes: of the class's tensors, by name.
    """
    keys = folder.family.keys
    stacks: dict[str, Stack] = {}
    for name, tensor in read_tensors(folder.path):
        if folder.layout == "transformers":
            yield adapt_name(name, shapes), tensor
        elif not keys.is_unused(name):
            match = keys.from_original(name)
            if match is None:
                yield name, tensor
            elif match.change == "stack":
                native = match.native[0]
                stack = stacks.setdefault(native, Stack(shapes.get(native, torch.Size())))
                if not stack.add(match, tensor):
                    yield name, tensor
                elif stack.is_full:
                    yield native, stacks.pop(native).tensor
            else:
                for native, part in zip(match.native, match.to_native(tensor), strict=True):
                    yield adapt_name(native, shapes), part


class Stack:
    """A tensor that holds many tensors of the files, while it fills.

    Args:
        shape: (E, rows, columns).
    """

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.tensor = torch.empty(0)
        self.wanted = 0
        self.seen: set[str] = set()

    @property
    def is_full(self) -> bool:
        """Whether every part is in its place."""
        return len(self.seen) == self.wanted

    def add(self, match: Match, tensor: Tensor) -> bool:
        """Puts a part in its place; False if it has none there, or is of another shape."""
        if len(self.shape) != 3 or match.index >= self.shape[0]:
            return False
        if not self.seen:
            self.tensor = torch.empty(self.shape, dtype=tensor.dtype)
            self.wanted = self.shape[0] * match.part[1]
        # Nothing is rounded if the parts differ.
        self.tensor = self.tensor.to(torch.promote_types(self.tensor.dtype, tensor.dtype))
        place = match.place_in(self.tensor)
        if place.shape != tensor.shape:
            return False
        place.copy_(tensor)
        self.seen.add(match.original)
        return True


def adapt_name(name: str, expected: Container[str]) -> str:
    """The name as this release of transformers has it.

    The tower of DeepSeek-VL is ``model.vision_model`` in some releases and
    ``model.vision_model.vision_model`` in others; files of both are in use.
    """
    if name in expected:
        return name
    for pattern, other in (
        (r"^model\.vision_model\.vision_model\.", "model.vision_model."),
        (r"^model\.vision_model\.", "model.vision_model.vision_model."),
    ):
        changed = re.sub(pattern, other, name)
        if changed in expected:
            return changed
    return name


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Puts a parameter in place of the one with that name."""
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner).register_parameter(leaf, parameter)


def _place(
    model: nn.Module, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype
) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if holds_quantized(owner, leaf):
        made = quantized_weight(owner, tensor.to(dtype), device)
    else:
        # A copy: the tensor may be a view of a mapped file.
        data = tensor.to(device, dtype, copy=True)
        made = nn.Parameter(data.contiguous(), requires_grad=False)
    set_parameter(model, name, made)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _gpu_dtype(folder: ModelFolder) -> str:
    stated = str(folder.config.get("dtype") or folder.config.get("torch_dtype") or "")
    known = stated.removeprefix("torch.")
    return known if known in ("bfloat16", "float16") else "bfloat16"


def _refuse(
    folder: ModelFolder, missing: list[str], unexpected: list[str], wrong: list[str]
) -> None:
    found = [
        f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in (
            ("tensors missing", missing),
            ("tensors that the model does not have", unexpected),
            ("tensors of the wrong shape", wrong),
        )
        if names
    ]
    if found:
        raise CheckpointError(
            "; ".join(found),
            place=str(folder.path),
            hint="the weights do not belong to this config.json, or are damaged",
        )
