"""A layer's experts with LoRA, or in 4 bit, by grouped matrix products.

    tokens, each with its k experts ── sorted by expert ──> one product per projection, in which
    each expert's rows meet its own weights ──> back in order, weighed, summed

It is registered with transformers as an ``experts_implementation``. Beyond transformers' own
grouped one: gradients of tokens are summed in one order, so that a run can be repeated bit by bit;
LoRA adds two thin grouped products, and no weight-sized tensor is made in a step; 4 bit weights are
dequantised one projection at a time, and again for the backward pass instead of kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import layer as peft_layers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PLAIN_EXPERTS = DeepseekV2Experts
IMPLEMENTATION = "vlft_grouped_mm"
PROJECTIONS = ("gate_up_proj", "down_proj")

# Grouped products on CUDA want rows of a multiple of 16 bytes.
ALIGNMENT = 8


@dataclass(frozen=True)
class Factors:
    """A low-rank addition to the weights of E experts.

    Attributes:
        down: (E, r, in).
        up: (E, r, out), each expert's B transposed.
        scale: of their product.
    """

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Groups:
    """Which rows belong to which expert.

    Attributes:
        order: (S,) int64, which of (token 0, 1st expert), (token 0, 2nd expert), ... each row is;
            rows are sorted by expert.
        place: (S,) int64, the inverse: where those are among the rows.
        ends: (E,) int32, one past the last row of each expert.
    """

    order: Tensor
    place: Tensor
    ends: Tensor

    @staticmethod
    def of(chosen: Tensor, experts: int) -> Groups:
        """The groups of (N, k) indices of experts."""
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        # Not by counting, for which the CPU would wait for the GPU.
        ends = torch.searchsorted(
            flat[order], torch.arange(experts, device=flat.device), right=True
        )
        return Groups(order, place, ends.to(torch.int32))


def grouped_forward(
    experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, lora: Mapping[str, Factors]
) -> Tensor:
    """What the experts of a layer make of N tokens.

    Args:
        experts: holds gate_up_proj (E, 2I, D), down_proj (E, D, I) and act_fn; plain or in 4 bit.
        hidden: (N, D).
        chosen: (N, k) int64, the experts of each token.
        weights: (N, k), how much each counts.
        lora: additions by the name of the projection.

    Returns:
        (N, D) in the dtype of ``hidden``.
    """
    groups = Groups.of(chosen, experts.num_experts)
    rows: Tensor = ToRows.apply(hidden, groups.order, groups.place)
    both = _project(experts, "gate_up_proj", rows, groups, lora)
    shares = Reordered.apply(weights.reshape(-1, 1), groups.order, groups.place)
    gated = partial(_gated, experts.act_fn)
    if torch.is_grad_enabled():
        # Kept for the backward pass is what goes in; the rest is computed again.
        gated = partial(checkpoint, gated, use_reentrant=False, preserve_rng_state=False)
    inner = gated(both, shares)
    rows = _project(experts, "down_proj", inner, groups, lora)
    in_order = Reordered.apply(rows, groups.place, groups.order).unflatten(0, chosen.shape)
    total: Tensor = in_order.sum(1, dtype=torch.float32)
    return total.to(hidden.dtype)


def _gated(act: Callable[[Tensor], Tensor], both: Tensor, shares: Tensor) -> Tensor:
    """(S, 2I) gate and up -> (S, I), each row times its expert's share.

    The share may as well come before the down projection, which is linear: there a row is narrower.
    """
    gate, up = both.chunk(2, dim=-1)
    return act(gate) * up * shares


def plain_forward(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What transformers calls for experts without LoRA, in 16 or 32 bit."""
    return grouped_forward(experts, hidden, chosen, weights, {})


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, plain_forward)


class ToRows(torch.autograd.Function):
    """Each token to its k rows; backward, a token's k gradients are summed in a fixed order.

    Indexing alone adds them up as threads come by, which changes the last bits from run to run.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, place: Tensor) -> Tensor:
        """(N, D) tokens -> (S, D) rows, S = N * k."""
        ctx.save_for_backward(place)
        ctx.tokens = len(hidden)
        return hidden[order // (len(order) // len(hidden))]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """(S, D) -> (N, D)."""
        (place,) = ctx.saved_tensors
        return gradients[0][place].unflatten(0, (ctx.tokens, -1)).sum(1), None, None


class Reordered(torch.autograd.Function):
    """Rows in another order; the way back is the inverse, not a sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """(S, D) -> (S, D)."""
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """(S, D) -> (S, D)."""
        (inverse,) = ctx.saved_tensors
        return gradients[0][inverse], None, None


def _project(
    experts: Any, name: str, rows: Tensor, groups: Groups, lora: Mapping[str, Factors]
) -> Tensor:
    """(S, in) rows -> (S, out), each by its expert's weights."""
    weight = getattr(experts, name)
    if isinstance(experts, Experts4bit):
        rows = rows.to(experts.dtype)
        product: Tensor = FrozenProduct.apply(rows, groups.ends, weight)
    else:
        # As autocast treats linear layers: weights that train are float32.
        kind = rows.device.type
        half = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if half else weight.dtype
        rows = rows.to(dtype)
        product = F.grouped_mm(rows, weight.to(dtype).transpose(-2, -1), offs=groups.ends)
    if name in lora:
        thin = aligned(lora[name], rows.dtype)
        inner = F.grouped_mm(rows, thin.down.transpose(-2, -1), offs=groups.ends)
        product = product + thin.scale * F.grouped_mm(inner, thin.up, offs=groups.ends)
    return product


def aligned(factors: Factors, dtype: torch.dtype) -> Factors:
    """The factors in a dtype, with zeros up to a rank that grouped products take."""
    missing = -factors.down.shape[1] % ALIGNMENT
    down, up = (
        F.pad(factor, (0, 0, 0, missing)).to(dtype).contiguous()
        for factor in (factors.down, factors.up)
    )
    return Factors(down, up, factors.scale)


class FrozenProduct(torch.autograd.Function):
    """A grouped product with 4 bit weights, which are dequantised anew for the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ends: Tensor, weight: Any) -> Tensor:
        """(S, in) rows, (E,) ends of groups, (E, out, in) in 4 bit -> (S, out)."""
        ctx.save_for_backward(ends)
        ctx.weight = weight
        return F.grouped_mm(rows, dequantized(weight).to(rows.dtype).transpose(-2, -1), offs=ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the rows; the weights are frozen."""
        (ends,) = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        weight = dequantized(ctx.weight).to(gradient.dtype)
        return F.grouped_mm(gradient, weight, offs=ends), None, None


class Experts4bit(nn.Module):
    """The experts of a layer with weights in 4 bit.

    Args:
        plain: the experts that it stands for, e.g. on the meta device.
        dtype: of the products.
    """

    def __init__(self, plain: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = plain.config
        self.num_experts: int = plain.num_experts
        self.act_fn = plain.act_fn
        self.dtype = dtype
        self.shapes = {name: getattr(plain, name).shape for name in PROJECTIONS}
        self.gate_up_proj = plain.gate_up_proj
        self.down_proj = plain.down_proj

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """(N, D) tokens -> (N, D)."""
        return grouped_forward(self, hidden, chosen, weights, {})


def dequantized(weight: Any) -> Tensor:
    """(E, out, in): the weights that products with a 4 bit parameter are made with."""
    import bitsandbytes as bnb

    value: Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return value


class ParamWrapper(peft_layers.ParamWrapper):
    """peft's LoRA on one parameter of the experts; peft nests one in the other for both.

    The name is peft's too: that is how peft knows its wrappers.

    Its weights, names and files are peft's, so that plain peft loads what is trained here: A is
    (E * r, in), expert by expert; B is (out, r * E), rank by rank. Only the forward differs: peft
    adds the product of A and B to the weights, which makes a tensor of their size.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        base = self.get_base_layer()
        if not isinstance(base, Experts4bit):
            sizes: tuple[int, int] = super()._get_in_out_features(module)
            return sizes
        self.num_experts, outputs, inputs = base.shapes[self.parameter_name]
        self._param_ndim = 3
        # In the order of the axes, as the parent has them before it swaps them.
        return outputs, inputs

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """(N, D) tokens, (N, k) experts and their weights -> (N, D)."""
        if self.disable_adapters or self.merged:
            result: Tensor = self.base_layer(hidden, chosen, weights)
            return result
        factors: dict[str, Factors] = {}
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            factors[layer.parameter_name] = layer.factors(layer.active_adapters[0])
            layer = layer.base_layer
        return grouped_forward(layer, hidden, chosen, weights, factors)

    def factors(self, adapter: str) -> Factors:
        """The adapter's matrices by expert."""
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return Factors(
            down.unflatten(0, (self.num_experts, -1)),
            up.unflatten(1, (-1, self.num_experts)).permute(2, 1, 0),
            self.scaling[adapter],
        )
