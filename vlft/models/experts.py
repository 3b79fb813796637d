"""A layer's experts, with LoRA or in 4 bit, by grouped matrix products.

    N tokens with k experts each ── S = N k rows, sorted by expert ── one grouped product per
    projection, each expert's rows by its own weights ── back in token order, weighted, summed

Registered with transformers as an ``experts_implementation``. Beyond transformers' own grouped
products: gradients of tokens are summed in a fixed order, so that a run can be repeated bit for
bit; LoRA adds two grouped products of its rank, and no tensor of the weights' size is made in a
step; 4 bit weights are dequantised one projection at a time, and again for the backward pass
instead of being kept.

Legend: N tokens, k experts per token (top_k), S rows, E experts, D hidden size, I intermediate
size, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import layer as peft_layers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextExperts
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts
from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrTextExperts

from vlft.models.four_bit import dequantized, dequantized_parts
from vlft.models.grouped import Groups, grouped_product, loops_over_groups
from vlft.models.uncompiled import uncompiled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# transformers' classes of experts; they differ in their names alone.
PLAIN_EXPERTS = (DeepseekV2Experts, DeepseekOcr2TextExperts, UnlimitedOcrTextExperts)
IMPLEMENTATION = "vlft_grouped_mm"
PROJECTIONS = ("gate_up_proj", "down_proj")

# Grouped products on CUDA require rows whose length is a multiple of 16 bytes.
ALIGNMENT = 8


@dataclass(frozen=True)
class LoraFactors:
    """LoRA matrices of E experts, and the factor of their product."""

    a: Tensor  # (E, r, in)
    b: Tensor  # (E, r, out), each expert's B transposed
    scaling: float


@uncompiled
def grouped_forward(
    experts: Any,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    lora: Mapping[str, LoraFactors] = MappingProxyType({}),
) -> Tensor:
    """(N, D), in the dtype of ``hidden``: weighted sum of the outputs of each token's experts.

    Args:
        experts: module with gate_up_proj (E, 2I, D), down_proj (E, D, I), act_fn; 32, 16 or 4 bit.
        hidden: (N, D).
        top_k_index: (N, k) int64, the experts of each token.
        top_k_weights: (N, k), the router's weights of them.
        lora: LoRA matrices by the name of the projection.
    """
    loop = loops_over_groups(hidden.device, _product_dtype(experts, hidden.device))
    groups = Groups.of(top_k_index, experts.num_experts, loop=loop)
    inputs: Tensor = _GatherTokens.apply(hidden, groups.slots, groups.rows)
    gate_up = _project(experts, "gate_up_proj", inputs, groups, lora)
    weights = _Permute.apply(top_k_weights.reshape(-1, 1), groups.slots, groups.rows)
    activate = partial(_activate, experts.act_fn)
    if torch.is_grad_enabled():
        # Only its inputs are kept for the backward pass; the rest is recomputed.
        activate = partial(checkpoint, activate, use_reentrant=False, preserve_rng_state=False)
    outputs = _project(experts, "down_proj", activate(gate_up, weights), groups, lora)
    by_slot = _Permute.apply(outputs, groups.rows, groups.slots)
    total: Tensor = by_slot.unflatten(0, top_k_index.shape).sum(1, dtype=torch.float32)
    return total.to(hidden.dtype)


def _activate(act: Callable[[Tensor], Tensor], gate_up: Tensor, weights: Tensor) -> Tensor:
    """(S, 2I) gate and up -> (S, I) intermediate states times the router's (S, 1) weights.

    The weights may come before the down projection because it is linear; rows are narrower here.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return act(gate) * up * weights


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, grouped_forward)


class _GatherTokens(torch.autograd.Function):
    """(N, D) -> (S, D): each token's k rows, whose k gradients are summed in a fixed order.

    The gradient of indexing would be summed by several CPU threads in no fixed order, which changes
    the last bits from run to run.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.tokens = len(hidden)
        return hidden[slots // (len(slots) // len(hidden))]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return gradients[0][rows].unflatten(0, (ctx.tokens, -1)).sum(1), None, None


class _Permute(torch.autograd.Function):
    """(S, D) rows in another order; the backward pass is the inverse permutation, not a sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return values[order]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0][inverse], None, None


def _project(
    experts: Any, name: str, inputs: Tensor, groups: Groups, lora: Mapping[str, LoraFactors]
) -> Tensor:
    """(S, in) rows -> (S, out), each by the weights of its expert."""
    weight = getattr(experts, name)
    inputs = inputs.to(_product_dtype(experts, inputs.device))
    if isinstance(experts, Experts4bit):
        if _is_decoding(experts, name, inputs):
            chosen = dequantized_parts(weight, groups.experts).to(inputs.dtype)
            product: Tensor = (chosen @ inputs.unsqueeze(2)).squeeze(2)
        else:
            product = Product4bit.apply(inputs, groups.ends, groups.bounds, weight)
    else:
        product = groups.product(inputs, weight.to(inputs.dtype).transpose(-2, -1))
    if name in lora:
        factors = _padded(lora[name], inputs.dtype)
        low_rank = groups.product(inputs, factors.a.transpose(-2, -1))
        added = groups.product(low_rank, factors.b)
        product = product + factors.scaling * added
    return product


def _product_dtype(experts: Any, device: torch.device) -> torch.dtype:
    """The dtype of the products of experts, plain or in 4 bit.

    As autocast treats linear layers: trained weights are float32, products may be 16 bit.
    """
    dtype: torch.dtype
    if isinstance(experts, Experts4bit):
        dtype = experts.dtype
    elif torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    else:
        dtype = experts.down_proj.dtype
    return dtype


def _is_decoding(experts: Experts4bit, name: str, inputs: Tensor) -> bool:
    """Whether rows are so few that only their experts are worth dequantising.

    That of all experts would take most of the time of a decoding step. Rows of weights must be made
    of whole blocks of equal scale, else bitsandbytes 0.50 takes other scales on the CPU.
    """
    few = not torch.is_grad_enabled() and 2 * len(inputs) <= experts.num_experts
    return few and experts.shapes[name][-1] % getattr(experts, name).quant_state.blocksize == 0


def _padded(factors: LoraFactors, dtype: torch.dtype) -> LoraFactors:
    """The factors in a dtype, the rank padded with zeros to what grouped products take."""
    padding = (0, 0, 0, -factors.a.shape[1] % ALIGNMENT)
    a, b = (F.pad(part, padding).to(dtype).contiguous() for part in (factors.a, factors.b))
    return LoraFactors(a, b, factors.scaling)


class Product4bit(torch.autograd.Function):
    """A grouped product with frozen 4 bit weights, dequantised again for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, ends: Tensor, bounds: tuple[int, ...] | None, weight: Any
    ) -> Tensor:
        """(S, in) rows, (E,) ends of groups, (E, out, in) in 4 bit -> (S, out)."""
        ctx.save_for_backward(ends)
        ctx.bounds, ctx.weight = bounds, weight
        plain = dequantized(weight).to(inputs.dtype)
        return grouped_product(inputs, plain.transpose(-2, -1), ends, bounds)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """(S, out) -> (S, in): gradient of the inputs; the weights have none."""
        (ends,) = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        weight = dequantized(ctx.weight).to(gradient.dtype)
        return grouped_product(gradient, weight, ends, ctx.bounds), None, None, None


class Experts4bit(nn.Module):
    """The experts of a layer with 4 bit weights, in place of plain ones; products are in dtype."""

    def __init__(self, plain: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.plain_class = type(plain)
        self.config = plain.config
        self.num_experts: int = plain.num_experts
        self.act_fn = plain.act_fn
        self.dtype = dtype
        # Parameters in 4 bit are flat and have lost their shapes.
        self.shapes = {name: getattr(plain, name).shape for name in PROJECTIONS}
        self.gate_up_proj = plain.gate_up_proj
        self.down_proj = plain.down_proj

    forward = grouped_forward


class ParamWrapper(peft_layers.ParamWrapper):
    """peft's LoRA on one parameter of the experts, computed without a tensor of the weights' size.

    peft adds the product of A and B to the weights; here only the forward differs. Parameters,
    names and files are peft's, so that plain peft loads what is trained here: A is (E r, in),
    expert by expert; B is (out, r E), rank by rank. LoRA on both parameters is one wrapper around
    another. The class has the name of peft's, by which peft recognises its wrappers.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        base = self.get_base_layer()
        if not isinstance(base, Experts4bit):
            sizes: tuple[int, int] = super()._get_in_out_features(module)
            return sizes
        self.num_experts, outputs, inputs = base.shapes[self.parameter_name]
        self._param_ndim = 3
        # peft's own returns them in the order of the parameter's axes; its caller swaps them.
        return outputs, inputs

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(N, D) tokens -> (N, D); see grouped_forward."""
        if self.disable_adapters or self.merged:
            result: Tensor = self.base_layer(hidden, top_k_index, top_k_weights)
            return result
        lora: dict[str, LoraFactors] = {}
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            lora[layer.parameter_name] = layer._factors(layer.active_adapters[0])
            layer = layer.base_layer
        return grouped_forward(layer, hidden, top_k_index, top_k_weights, lora)

    def _factors(self, adapter: str) -> LoraFactors:
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return LoraFactors(
            a.unflatten(0, (self.num_experts, -1)),
            b.unflatten(1, (-1, self.num_experts)).permute(2, 1, 0),
            self.scaling[adapter],
        )
