"""Products of rows that are sorted by expert, each expert's rows by its own weights.

    rows (S, in)  ━━ expert 0 ━━┿━━━━ expert 1 ━━━━┿━ ... ━   weight (E, in, out)   ->   (S, out)

One kernel computes all groups where torch has one; elsewhere a loop does, over lengths that the
host reads once per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator

# Major compute capabilities of the GPUs for which torch has a kernel of grouped products: Hopper
# (9.0) and Blackwell of data centres (10.0).
KERNEL_CAPABILITIES = (9, 10)


def loops_over_groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether grouped products are a loop of vlft's instead of torch's ``grouped_mm``.

    torch has a kernel for bfloat16 on the GPUs of KERNEL_CAPABILITIES. On others, and for other
    dtypes, it loops over the experts too, but makes the host wait for the GPU in every product to
    read the lengths of the groups: 4 to 16 times a layer and step, where once suffices. A CPU waits
    for nothing.
    """
    if device.type != "cuda":
        return False
    major, _ = torch.cuda.get_device_capability(device)
    return dtype != torch.bfloat16 or major not in KERNEL_CAPABILITIES


@dataclass(frozen=True)
class Groups:
    """Rows sorted by expert. Slot i is the (i % k)-th expert of token i // k.

    Legend: N tokens, k experts per token, S = N k rows, E experts.
    """

    slots: Tensor  # (S,) int64, the slot of each row
    rows: Tensor  # (S,) int64, the row of each slot: the inverse permutation
    ends: Tensor  # (E,) int32, one past the last row of each expert
    experts: Tensor  # (S,) int64, the expert of each row
    bounds: tuple[int, ...] | None = None  # 0 and the ends, on the host; None if no loop needs them

    @staticmethod
    def of(top_k_index: Tensor, num_experts: int, *, loop: bool = False) -> Groups:
        """The groups of (N, k) expert indices; ``loop`` as loops_over_groups says."""
        experts = top_k_index.flatten()
        slots = experts.argsort(stable=True)
        rows = torch.empty_like(slots)
        rows[slots] = torch.arange(len(slots), device=slots.device)
        # Counting the rows of each expert would make the CPU wait for the GPU.
        of_rows = experts[slots]
        ends = torch.searchsorted(
            of_rows, torch.arange(num_experts, device=experts.device), right=True
        )
        bounds = (0, *ends.tolist()) if loop else None
        return Groups(slots, rows, ends.to(torch.int32), of_rows, bounds)

    def product(self, rows: Tensor, weight: Tensor) -> Tensor:
        """(S, out): rows (S, in), sorted by expert, times weight (E, in, out)."""
        return grouped_product(rows, weight, self.ends, self.bounds)


def grouped_product(
    rows: Tensor, weight: Tensor, ends: Tensor, bounds: tuple[int, ...] | None
) -> Tensor:
    """See Groups.product; ends and bounds are those of the groups."""
    if bounds is None:
        return F.grouped_mm(rows, weight, offs=ends)
    product: Tensor = _Loop.apply(rows, weight, bounds)
    return product


class _Loop(torch.autograd.Function):
    """A product for each expert that has rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bounds: tuple[int, ...]) -> Tensor:
        # Only the gradient of trained weights needs the rows; kept, they would cost memory in vain.
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        ctx.bounds = bounds
        return _multiplied(rows, weight, bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        by_rows = by_weight = None
        if ctx.needs_input_grad[0]:
            by_rows = _multiplied(gradient, weight.mT, ctx.bounds)
        if ctx.needs_input_grad[1]:
            by_weight = torch.zeros_like(weight)
            for expert, part in _parts(ctx.bounds):
                torch.mm(rows[part].T, gradient[part], out=by_weight[expert])
        return by_rows, by_weight, None


def _multiplied(rows: Tensor, weight: Tensor, bounds: tuple[int, ...]) -> Tensor:
    product = rows.new_empty((len(rows), weight.shape[2]))
    for expert, part in _parts(bounds):
        torch.mm(rows[part], weight[expert], out=product[part])
    return product


def _parts(bounds: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and these rows."""
    for expert, (first, end) in enumerate(pairwise(bounds)):
        if first < end:
            yield expert, slice(first, end)
