"""Model folder -> model in memory, tensor by tensor: the peak is about the size of the model.

The module is built on the meta device; each tensor of the files is renamed, cast, moved, quantised
if asked, and put in place, or mapped from its file if nothing changes. Tensors that are missing,
unexpected or of the wrong shape are an error that names them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from vlft import console
from vlft.checkpoints.export import canonical_name, nested_name
from vlft.checkpoints.quantize import (
    Rounding,
    finish_quantized,
    holds_quantized,
    quantize_language,
    quantized_weight,
)
from vlft.checkpoints.weights import read_tensors, warn_of_other_weights
from vlft.errors import CheckpointError, explaining_memory, shown
from vlft.families.base import keeps_dtype
from vlft.families.processor import config_errors
from vlft.models.adaptations import prepare_for_inference

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from transformers import PreTrainedModel

    from vlft.checkpoints.locate import ModelFolder
    from vlft.checkpoints.placement import Placement
    from vlft.families.keymap import Match

# Of weights in files.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_model(
    folder: ModelFolder,
    placement: Placement,
    *,
    keep_dtypes: bool = False,
    trained: Placement | None = None,
) -> PreTrainedModel:
    """The model of a folder, in evaluation mode, no gradients required.

    ``keep_dtypes`` keeps each tensor's dtype of its file instead of the placement's. ``trained`` is
    the placement of a quantised run: the weights, in float32, are those that it computed with.

    Raises:
        CheckpointError: the files do not fit the class.
    """
    hint = "use a smaller model, or --quantize nf4 (vlft sft and infer), or --device cpu"
    if placement.device.type == "cpu":
        hint = "use a smaller model, or --dtype bfloat16 or --quantize nf4 (vlft sft and infer)"
    with explaining_memory("while the model is loaded", hint, place=str(placement.device)):
        return _load(folder, placement, trained, keep_dtypes=keep_dtypes)


def _load(
    folder: ModelFolder, placement: Placement, trained: Placement | None, *, keep_dtypes: bool
) -> PreTrainedModel:
    warn_of_other_weights(folder.path)
    # FlexAttention is for the LLM only: the towers have no mask.
    flex = placement.attn == "flex"
    model = empty_model(folder, "sdpa" if flex else placement.attn)
    if flex:
        language: Any = model.get_submodule(folder.family.parts.language)
        language.config._attn_implementation = "flex_attention"
    quantize_language(model, folder.family, placement.quantize, placement.dtype)
    filled, problems = _fill(model, folder, placement, trained, keep_dtypes=keep_dtypes)
    _tie(model, folder, filled)
    missing = [name for name in _shapes(model) if name not in filled]
    _refuse(folder, {"missing": missing, **problems})
    if placement.quantize != "none":
        finish_quantized(model, placement.quantize, placement.device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            module._buffers[name] = buffer.to(placement.device)
    model.requires_grad_(False)
    model.name_or_path = folder.name
    return model.eval()


def _fill(
    model: PreTrainedModel,
    folder: ModelFolder,
    placement: Placement,
    trained: Placement | None,
    *,
    keep_dtypes: bool,
) -> tuple[set[str], dict[str, list[str]]]:
    """Gives a model the tensors of a folder; returns the names filled, and what is wrong."""
    shapes = _shapes(model)
    filled: set[str] = set()
    unexpected: list[str] = []
    wrong: list[str] = []
    broken: list[str] = []
    tensors = native_tensors(folder, model)
    rounding = None
    if trained is not None:
        rounding = rounding_of(model, folder, trained)
        tensors = console.tracked(tensors, "quantising the weights as in training", len(shapes))
    for name, tensor in tensors:
        if name not in shapes:
            unexpected.append(name)
        elif shapes[name] != tensor.shape or tensor.dtype not in FLOATS:
            found = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            wrong.append(f"{name} {found}, not {tuple(shapes[name])}")
        else:
            # One pass at the speed of memory; isfinite takes forty times as long in 16 bits.
            if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                broken.append(name)
            kept = keep_dtypes or keeps_dtype(name, folder.family)
            if rounding is not None:
                tensor = tensor.float() if kept else rounding.apply(name, tensor)
            _place(model, name, tensor, placement.device, tensor.dtype if kept else placement.dtype)
            filled.add(name)
    return filled, {
        "that the model does not have": unexpected,
        "of the wrong shape or type": wrong,
        "with values that are no numbers (NaN or infinite)": broken,
    }


def rounding_of(model: PreTrainedModel, folder: ModelFolder, trained: Placement) -> Rounding:
    """How a quantised run rounds the weights of this plain model, which may be empty."""
    return Rounding.of(model, folder.family, trained.quantize, trained.dtype, trained.device)


def _tie(model: PreTrainedModel, folder: ModelFolder, filled: set[str]) -> None:
    """Ties lm_head to the embedding if the configuration says so and the files do not differ.

    Files that hold two different tensors decide, as in transformers.
    """
    config, name = model.config, f"{folder.family.parts.head}.weight"
    if not config.tie_word_embeddings:
        return
    embedding = model.get_input_embeddings().weight
    head = model.get_parameter(name)
    if name in filled and not embedding.is_meta and not torch.equal(head, embedding):
        place = shown(folder.path / "config.json")
        console.warn(
            f"{place}: tie_word_embeddings is true, but the files hold an lm_head that differs "
            "from the embedding; both are used as they are"
        )
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        return
    model.tie_weights()
    filled.add(name)


def empty_model(
    folder: ModelFolder, attn: str = "sdpa", *, image_token_id: int | None = None
) -> PreTrainedModel:
    """The model of a folder with its weights on the meta device and real buffers.

    transformers would draw every weight, also on the meta device: four fifths of the time that the
    loading of a tiny model takes.
    """
    cls: Any = folder.family.model_class()
    with (
        init_empty_weights(include_buffers=False),
        no_init_weights(),
        config_errors(folder.path, folder.family),
    ):
        try:
            config = cls.config_class(**folder.native_config(image_token_id))
        except StrictDataclassError as error:
            raise CheckpointError(f"a value that the model cannot have: {error}") from None
        model: PreTrainedModel = cls._from_config(config, attn_implementation=attn)
    prepare_for_inference(model)
    return model


def native_tensors(folder: ModelFolder, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name in the model and tensor, for every tensor of a folder that a module uses.

    Also in its own layout, transformers itself writes DeepSeek-OCR under the authors' names.
    """
    keys, shapes = folder.family.keys, _shapes(model)
    stacks: dict[str, _Stack] = {}
    for name, tensor in read_tensors(folder.path):
        known = adapt_name(name, shapes)
        if folder.layout == "transformers" and known in shapes:
            yield known, tensor
        elif not keys.is_unused(name):
            match = keys.from_original(name)
            if match is None:
                yield name, tensor
            elif match.change == "stack":
                native = match.native[0]
                stack = stacks.setdefault(native, _Stack(shapes.get(native, torch.Size())))
                if not stack.add(match, tensor):
                    yield name, tensor
                elif len(stack.added) == stack.parts:
                    yield native, stacks.pop(native).tensor
            else:
                for native, part in zip(match.native, match.to_native(tensor), strict=True):
                    yield adapt_name(native, shapes), part


def file_dtypes(folder: ModelFolder, model: nn.Module) -> dict[str, torch.dtype]:
    """The data type that each parameter of the model has in the files of a folder."""
    keys, shapes = folder.family.keys, _shapes(model)
    found: dict[str, torch.dtype] = {}
    for name, tensor in read_tensors(folder.path):
        is_native = folder.layout == "transformers" and adapt_name(name, shapes) in shapes
        match = None if is_native else keys.from_original(name)
        for native in match.native if match else (name,):
            known = adapt_name(native, shapes)
            found[known] = torch.promote_types(tensor.dtype, found.get(known, tensor.dtype))
    return found


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


class _Stack:
    """A tensor of the model that is filled with several tensors of the files, one per expert."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape  # (E, rows, columns)
        self.tensor = torch.empty(0)
        self.parts = 0
        self.added: set[str] = set()

    def add(self, match: Match, tensor: Tensor) -> bool:
        """Copies a part to its place; False if there is no such place, or of another shape."""
        if len(self.shape) != 3 or match.index >= self.shape[0]:
            return False
        if not self.added:
            self.tensor = torch.empty(self.shape, dtype=tensor.dtype)
            self.parts = self.shape[0] * match.part[1]
        # Promoted, so that no part is rounded if their dtypes differ.
        self.tensor = self.tensor.to(torch.promote_types(self.tensor.dtype, tensor.dtype))
        place = match.place_in(self.tensor)
        if place.shape != tensor.shape:
            return False
        place.copy_(tensor)
        self.added.add(match.original)
        return True


def adapt_name(name: str, expected: Container[str]) -> str:
    """The name that this release of transformers has for a tensor.

    The tower of DeepSeek-VL is ``model.vision_model`` in some releases and
    ``model.vision_model.vision_model`` in others; there are files of both.
    """
    candidates = (name, canonical_name(name), nested_name(name))
    return next((known for known in candidates if known in expected), name)


def _place(
    model: nn.Module, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype
) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if holds_quantized(owner, leaf):
        parameter = quantized_weight(owner, tensor.to(dtype), device)
    else:
        # Of the right dtype and device it stays mapped from its file: pages are read when they are
        # used, and one that is written to becomes private.
        parameter = nn.Parameter(tensor.to(device, dtype).contiguous(), requires_grad=False)
    owner.register_parameter(leaf, parameter)


def _refuse(folder: ModelFolder, problems: dict[str, list[str]]) -> None:
    found = [
        f"{len(names)} tensors {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in problems.items()
        if names
    ]
    if found:
        raise CheckpointError(
            "; ".join(found),
            place=str(folder.path),
            hint="the weights do not belong to this config.json, or are damaged",
        )
