"""All that vlft changes in modules of other packages, and how it is undone.

    adaptation                    changes                            inference   training
    grouped experts               experts implementation, LoRA class     x           x
    SAM attention head by head    class of the attention modules         x           x
    tree attention                attention implementation of the LLM    prompts     x
    narrowed last layer           forward of the LLM's last layer                    x
    cached last layer             forward of the LLM's last layer        prompts
    compiled layers               forward of the LLM's other layers, see compiled.py x

Each is idempotent and keeps its state in what it changes, so that ``restore`` works on the model,
on a copy of it and on peft's model around it. tests/test_adaptations.py has a test for each that
fails once the other package no longer needs it. Version bounds are the releases in which the need
was last seen.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import layer as peft_layers
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import (
    DeepseekOcr2SamVisionSdpaAttention,
)
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention
from transformers.models.unlimited_ocr.modeling_unlimited_ocr import (
    UnlimitedOcrSamVisionSdpaAttention,
)

from vlft.models.compiled import compiled_forward
from vlft.models.experts import IMPLEMENTATION, PLAIN_EXPERTS, ParamWrapper
from vlft.models.flex import FLEX
from vlft.models.last_layer import cached_forward, can_narrow, narrowed_forward
from vlft.models.tree_attention import TREE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Attention implementations and what takes their place for packed rows, and back.
OF_ROWS = {"sdpa": TREE, "flex_attention": FLEX}
RESTORED = {ours: plain for plain, ours in OF_ROWS.items()}


def prepare_for_inference(model: nn.Module) -> None:
    """Applies in place the adaptations that save memory or time whenever the model runs."""
    _group_experts(model)
    _attend_head_by_head(model)


def prepare_for_training(model: nn.Module, language: str) -> None:
    """Applies all adaptations in place; calls without a packed row work as before.

    LoRA layers are in place if there are any; ``language`` names the LLM, with layers as Llama's.
    """
    prepare_for_inference(model)
    _attend_by_trees(model.get_submodule(language))
    _narrow_last_layer(model.get_submodule(language))
    _keep_gate_and_up(model.get_submodule(language))
    _cast_once(model)


def restore(model: nn.Module) -> None:
    """Undoes every adaptation in place; the model is then transformers' and peft's own.

    Experts in 4 bit keep vlft's module, because transformers has none for them.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            config = module.config
            if config._attn_implementation in RESTORED:
                config._attn_implementation = RESTORED[config._attn_implementation]
            if config._experts_implementation == IMPLEMENTATION:
                config._experts_implementation = module.get_correct_experts_implementation(None)
        elif type(module) is ParamWrapper and _wraps_plain_experts(module):
            module.__class__ = peft_layers.ParamWrapper
        elif isinstance(module, HeadByHead):
            module.__class__ = type(module).plain
        elif _replaces(module, "forward", (narrowed_forward, _gated_forward, compiled_forward)):
            del module.forward
        elif _replaces(module, "_cast_input_dtype", (_cast_unless_autocast,)):
            del module._cast_input_dtype


def _replaces(module: Any, name: str, functions: tuple[Callable[..., Any], ...]) -> bool:
    """Whether a method of the module is replaced by one of these functions."""
    method = vars(module).get(name)
    return isinstance(method, partial) and method.func in functions


def _group_experts(model: nn.Module) -> None:
    """Experts, with or without LoRA, are computed by vlft's grouped products.

    Reason: transformers' grouped products gather a token's rows by indexing, whose gradient the
    threads of a CPU sum in no fixed order, and keep every intermediate state for the backward
    pass; peft's LoRA on a parameter makes a tensor as large as all experts' weights.

    Needed with: transformers 5.23, peft 0.21.
    """
    for module in model.modules():
        if isinstance(module, PLAIN_EXPERTS):
            module.config._experts_implementation = IMPLEMENTATION
        elif type(module) is peft_layers.ParamWrapper and _wraps_plain_experts(module):
            module.__class__ = ParamWrapper


def _wraps_plain_experts(wrapper: Any) -> bool:
    return isinstance(wrapper.get_base_layer(), PLAIN_EXPERTS)


def _attend_head_by_head(model: nn.Module) -> None:
    """The SAM tower's layers with global attention compute one head after the other.

    Reason: relative positions are a bias of all queries by all keys, 16.8 million numbers a head
    for an image of 1,024 pixels. transformers makes those of all heads at once, and a copy.
    Layers with windows stay as they are: their bias is small.

    Needed with: transformers 5.23.
    """
    for module in model.modules():
        attention: Any = getattr(module, "attn", None)
        if type(attention) in HEAD_BY_HEAD and module.window_size == 0:
            attention.__class__ = HEAD_BY_HEAD[type(attention)]


class HeadByHead:
    """Before one of transformers' classes of SAM's attention: same output, one head at a time."""

    plain: Any

    def forward(self: Any, hidden_states: Tensor, **_options: Any) -> tuple[Tensor, None]:
        """(B, H, W, D) -> (B, H, W, D), and None in place of attention weights."""
        batch, height, width, _ = hidden_states.shape
        size, tokens = (height, width), height * width
        projected = self.qkv(hidden_states).view(batch, tokens, 3, self.num_attention_heads, -1)
        heads = []
        for query, key, value in zip(*projected.permute(2, 3, 0, 1, 4), strict=True):
            bias = None
            if self.use_rel_pos:
                positions = self.rel_pos_h, self.rel_pos_w
                bias = self.get_decomposed_rel_pos(query, *positions, size, size)
                bias = bias.reshape(batch, 1, tokens, tokens)
            # Fused kernels need a dimension of heads.
            query, key, value = (part.unsqueeze(1) for part in (query, key, value))
            heads.append(F.scaled_dot_product_attention(query, key, value, attn_mask=bias))
        attended = torch.cat(heads, 1).transpose(1, 2)
        return self.proj(attended.reshape(batch, height, width, -1)), None


HEAD_BY_HEAD = {
    plain: type(f"HeadByHead{plain.__name__}", (HeadByHead, plain), {"plain": plain})
    for plain in (
        SamVisionSdpaAttention,
        DeepseekOcr2SamVisionSdpaAttention,
        UnlimitedOcrSamVisionSdpaAttention,
    )
}


def _attend_by_trees(language: Any) -> None:
    """The LLM computes a packed row's attention tree by tree, or with one kernel a layer.

    Reason: SDPA takes a packed row with a dense mask only, and then computes the scores of every
    pair of its tokens, see models.tree_attention; FlexAttention, which skips blocks, has no
    backward pass on the CPU, and is compiled for every length of a row, see models.flex.

    Needed with: torch 2.13, transformers 5.23.
    """
    before = language.config._attn_implementation
    language.config._attn_implementation = OF_ROWS.get(before, before)


@contextmanager
def filling_the_cache(language: Any) -> Iterator[None]:
    """The LLM takes packed rows and fills a cache, and returns no hidden states, in the block.

    Whatever its attention is otherwise, it attends by trees; its last layer computes keys and
    values alone.

    Reason: of prompts whose last tokens run later only keys and values are read; the last layer's
    queries, attention, output projection and MLP would be wasted work.

    Needed with: transformers 5.24.
    """
    before, layer = language.config._attn_implementation, language.layers[-1]
    forward = vars(layer).get("forward")
    language.config._attn_implementation = TREE
    if can_narrow(layer.self_attn):
        layer.forward = partial(cached_forward, layer)
    try:
        yield
    finally:
        language.config._attn_implementation = before
        vars(layer).pop("forward", None)
        if forward is not None:
            layer.forward = forward


def _narrow_last_layer(language: Any) -> None:
    """The LLM returns hidden states of some positions alone, if the call names them.

    ``language(..., positions_to_keep=positions)``, (S,) int64, returns (1, S, D); positions may
    repeat. With a packed row ``kept_row``, packing.attention.kept_attention of these positions, is
    given too. Without the arguments the output is the usual one.

    Reason: in the last layer only keys and values are read by other tokens. With images, nine of
    ten tokens have no target, and their last queries and MLP are wasted work; transformers narrows
    the vocabulary projection alone (``logits_to_keep``). The layer is never checkpointed when
    narrowed: its backward pass comes first, so that recomputing it would save no memory.

    Needed with: transformers 5.23.
    """
    layer = language.layers[-1]
    layer.forward = partial(narrowed_forward, layer)


def _keep_gate_and_up(language: nn.Module) -> None:
    """A feed-forward part keeps gate and up alone for its backward pass.

    Reason: autograd also keeps the activated gate, the largest of three equal tensors that hold
    more than half of a layer's memory; it is recomputed in one pass over the gate.

    Needed with: torch 2.13, transformers 5.23.
    """
    for module in language.modules():
        # The MLPs of all families' LLMs, by what they compute; each has its own class.
        activation = getattr(module, "act_fn", None)
        if hasattr(module, "gate_proj") and isinstance(activation, (SiLUActivation, nn.SiLU)):
            module.forward = partial(_gated_forward, module)


def _gated_forward(mlp: Any, hidden: Tensor) -> Tensor:
    product: Tensor = _SwiGLU.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden))
    result: Tensor = mlp.down_proj(product)
    return result


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, of equal shapes; the same bits as by autograd."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return of_gate, F.silu(gate).mul_(gradient)


def _cast_once(model: nn.Module) -> None:
    """Under autocast LoRA takes its input in 16 bit, as it is.

    Reason: peft casts it to the float32 of LoRA's weights, and autocast back to 16 bit at once: the
    same numbers, but two copies for each of a layer's matrices, one of which is kept.

    Needed with: peft 0.21.
    """
    for module in model.modules():
        # DoRA and the like compute with the input elsewhere too.
        if isinstance(module, peft_layers.LoraLayer) and not module.lora_variant:
            module._cast_input_dtype = partial(_cast_unless_autocast, module)


def _cast_unless_autocast(layer: Any, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.is_autocast_enabled(hidden.device.type):
        return hidden
    cast: Tensor = type(layer)._cast_input_dtype(layer, hidden, dtype)
    return cast
