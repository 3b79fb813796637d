"""Attention over a packed row, registered with transformers as an attention implementation.

A row is a forest of shared prefixes, cut where it branches into segments. A segment attends to its
context, the segments between it and the root, and causally to itself:

    ━━ system prompt ━━┯━━ image, prompt ━━┯━ question, reply  ┐
                       │                   ├─ question, reply  │ a block: short siblings, which
                       │                   └─ question, reply  ┘ have the same context
                       └━━ image, prompt, question, reply

A block of queries is a piece of a long segment, or some short siblings. Scores of tokens that do
not attend to each other are not computed but within a piece, and no (N, N) mask is held.

Legend: N tokens of the row, H heads, K of keys and values, G = H / K; n queries of a block, c
tokens of its context, r segments of at most w tokens each; d, e, x sizes of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlft.models.uncompiled import uncompiled

if TYPE_CHECKING:
    from torch import nn

# The name under which ``tree_attention`` is registered with transformers.
TREE = "vlft_tree"
# Runs of tokens, (first, end), in order.
Ranges: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Block:
    """Queries with a common context; within its own segment each attends causally.

    Attributes:
        context: (first, end) of runs of tokens of the row, in order.
        first: the first token.
        end: one past the last.
        lengths: tokens of each segment; of one alone if the block is a piece of it.
    """

    context: Ranges
    first: int
    end: int
    lengths: tuple[int, ...]

    @property
    def scores(self) -> int:
        """Number of scores that the matrix products on a CPU compute for each head."""
        context = sum(end - first for first, end in self.context)
        return (self.end - self.first) * context + len(self.lengths) * max(self.lengths) ** 2


def extended(ranges: Ranges, first: int, end: int) -> Ranges:
    """Appends a range to ranges; if it starts where the last one ends, the two are joined."""
    if ranges and ranges[-1][1] == first:
        return (*ranges[:-1], (ranges[-1][0], end))
    return (*ranges, (first, end))


@dataclass(frozen=True)
class BlockAttention:
    """A block with the masks and indices that all layers share.

    Products of a block have c + w columns: the context, then the tokens of a query's own segment.

    Attributes:
        block: the queries.
        ranges: of the tokens that all queries attend to, and their own if the segment is one.
        mask: added to the last columns of the scores: (n, w), or for fused kernels (n, c + n),
            None where the queries are one segment.
        slots: (r w,) of several segments, padded: the query that stands at each place.
        places: (n,), the inverse: the place of each query.
    """

    block: Block
    ranges: Ranges
    mask: Tensor | None
    slots: Tensor | None = None
    places: Tensor | None = None

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """(K, G, n, c + w) attention weights in float32; query (K, G, N, d), key (K, N, d)."""
        assert self.mask is not None
        scores = self.scores(self.own(query), key)
        scores[..., -self.mask.shape[1] :] += self.mask
        weights: Tensor = torch.softmax(scores, -1, dtype=torch.float32)
        return weights

    def own(self, rows: Tensor) -> Tensor:
        """The block's rows, (..., n, x) of (..., N, x)."""
        return rows[..., self.block.first : self.block.end, :]

    def scores(self, rows: Tensor, right: Tensor) -> Tensor:
        """(K, G, n, c + w) products of rows (K, G, n, x) and right (K, N, x)."""
        flat = rows.flatten(1, 2)
        width = sum(end - first for first, end in self.ranges)
        width += max(self.block.lengths) if self.places is not None else 0
        products = flat.new_empty((*flat.shape[:2], width))
        *context, own = self._columns(products)
        for columns, (first, end) in zip(context, self.ranges, strict=True):
            torch.bmm(flat, right[:, first:end].mT, out=columns)
        if self.places is not None:
            padded = self._padded(rows) @ self._padded(self.own(right)).unsqueeze(1).mT
            own.copy_(padded.flatten(2, 3).index_select(2, self.places).flatten(1, 2))
        return torch.unflatten(products, 1, rows.shape[1:3])

    def weigh(self, weights: Tensor, right: Tensor) -> Tensor:
        """(K, G, n, x) sums of right (K, N, x) by weights (K, G, n, c + w)."""
        *context, own = self._columns(weights)
        total = weights.new_zeros((weights.shape[0], weights.shape[1:3].numel(), right.shape[2]))
        for columns, (first, end) in zip(context, self.ranges, strict=True):
            total.baddbmm_(columns.flatten(1, 2), right[:, first:end])
        made = torch.unflatten(total, 1, weights.shape[1:3])
        if self.places is not None:
            padded = self._padded(own) @ self._padded(self.own(right)).unsqueeze(1)
            made += padded.flatten(2, 3).index_select(2, self.places)
        return made

    def spread(self, weights: Tensor, rows: Tensor, into: Tensor) -> None:
        """Adds weights (K, G, n, c + w), transposed, @ rows (K, G, n, x) to ``into`` (K, N, x)."""
        *context, own = self._columns(weights)
        for columns, (first, end) in zip(context, self.ranges, strict=True):
            left, right = columns.flatten(1, 2).mT, rows.flatten(1, 2)
            if left.dtype == into.dtype:
                # The product adds to what is there; a second pass over both would be slower.
                into[:, first:end].baddbmm_(left, right)
            else:
                into[:, first:end] += left @ right
        if self.places is not None and self.slots is not None:
            padded = own.new_zeros((*own.shape[:2], len(self.slots), own.shape[3]))
            padded = padded.index_copy_(2, self.places, own).unflatten(2, (-1, own.shape[3]))
            made = (padded.mT @ self._padded(rows)).sum(1).flatten(1, 2)
            self.own(into).add_(made.index_select(1, self.places))

    def _columns(self, weights: Tensor) -> tuple[Tensor, ...]:
        """Splits weights into the columns of each range and, last, those of the own segments."""
        sizes = [end - first for first, end in self.ranges]
        return torch.split(weights, [*sizes, weights.shape[-1] - sum(sizes)], -1)

    def _padded(self, rows: Tensor) -> Tensor:
        """(..., r, w, x): the segments of (..., n, x); padding repeats the first row."""
        assert self.slots is not None
        padded = rows.index_select(-2, self.slots)
        return torch.unflatten(padded, -2, (len(self.block.lengths), -1))


@dataclass(frozen=True)
class WholeRow:
    """The blocks of a row as one object: of a tuple the compiler makes code for each length."""

    blocks: tuple[BlockAttention, ...]


@uncompiled
def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row: tuple[BlockAttention, ...] | WholeRow | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Tree attention if the call carries a packed row, else transformers' own SDPA.

    query (1, H, N, d), key (1, K, N, d), value (1, K, N, x) -> (1, N, H, x) and None in place of
    attention weights. The signature is that of transformers' attention functions; attention_mask
    is for calls without a packed row.
    """
    if row is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return found
    blocks = row.blocks if isinstance(row, WholeRow) else row
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if has_fused_attention(query.device):
        return fused_attention(blocks, query, key, value, scaling), None
    if torch.is_autocast_enabled("cpu"):
        # Autocast casts the inputs of SDPA too, and is not active in the backward pass.
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (part.to(dtype) for part in (query, key, value))
    grouped = (query[0] * scaling).unflatten(0, (key.shape[1], -1))
    output: Tensor = _Products.apply(blocks, grouped, key[0], value[0])
    return output.unsqueeze(0), None


AttentionInterface.register(TREE, tree_attention)
AttentionMaskInterface.register(TREE, sdpa_mask)


def has_fused_attention(device: torch.device) -> bool:
    """Whether the device uses torch's fused kernels; a CPU does not."""
    return device.type != "cpu"


def fused_attention(
    row: tuple[BlockAttention, ...], query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> Tensor:
    """(1, N, H, x), with one of torch's fused kernels for each block."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    made = []
    for part in row:
        queries = part.own(query)
        keys, values = (
            torch.cat([rows[:, :, first:end] for first, end in part.ranges], 2)
            for rows in (key, value)
        )
        bias: Any = part.mask
        if bias is None:
            bias = causal_lower_right(queries.shape[2], keys.shape[2])
        made.append(F.scaled_dot_product_attention(queries, keys, values, bias, scale=scaling))
    return torch.cat(made, 2).transpose(1, 2).contiguous()


class _Products(torch.autograd.Function):
    """Attention by matrix products and a softmax for each block; the backward pass repeats them.

    On a CPU this takes the time of torch's fused kernel in float32, and two thirds of it in 16 bit.
    """

    @staticmethod
    def forward(
        ctx: Any, row: tuple[BlockAttention, ...], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """(N, H, x); query (K, G, N, d) scaled, key (K, N, d), value (K, N, x)."""
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        ctx.row = row
        ctx.save_for_backward(query, key, value)
        output = query.new_empty((query.shape[2], *query.shape[:2], value.shape[2]))
        for part in row:
            made = part.weigh(part.weights(query, key).to(value.dtype), value)
            output[part.block.first : part.block.end] = made.permute(2, 0, 1, 3)
        return output.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        """Gradients of query, key and value. Those of keys and values are summed in float32."""
        query, key, value = ctx.saved_tensors
        gradient = gradient.unflatten(1, query.shape[:2]).permute(1, 2, 0, 3).contiguous()
        of_query = torch.empty_like(query)
        of_key = torch.zeros_like(key, dtype=torch.float32)
        of_value = torch.zeros_like(value, dtype=torch.float32)
        for part in ctx.row:
            weights, above = part.weights(query, key), part.own(gradient)
            of_scores = torch.ops.aten._softmax_backward_data(
                part.scores(above, value).float(), weights, -1, torch.float32
            ).to(query.dtype)
            part.own(of_query).copy_(part.weigh(of_scores, key))
            part.spread(of_scores, part.own(query), of_key)
            part.spread(weights.to(value.dtype), above, of_value)
        return None, of_query, of_key.to(key.dtype), of_value.to(value.dtype)
