"""Plans the attention of a row from its exits: token j attends to token i iff i <= j < exit[i].

Where replies have a window, token i must also reach down to j, see packing.window.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from vlft.models.tree_attention import Block, BlockAttention, extended
from vlft.packing.window import UNBOUNDED, indices

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from torch.nn.attention.flex_attention import BlockMask

    from vlft.models.tree_attention import Ranges
    from vlft.packing.window import Window

# Most queries of a block on the CPU. Larger blocks make larger matrix products, but also compute
# more scores that the causal mask discards. In float32 64 is as fast as any size; in 16 bit 128 is
# a sixth faster than 64.
QUERIES = {torch.float32: 64}
QUERIES_16_BIT = 128
# Most tokens of sibling segments that are computed together as one block.
SIBLINGS = 256
# Fused kernels copy a mask whose rows do not start at a multiple of this many elements.
ALIGNMENT = 16
# Most queries of a block for fused kernels where replies have a window, so that its keys are few.
# Without a window a segment is one block.
WINDOWED_QUERIES = 512
# Side of a FlexAttention block in tokens.
BLOCK = 128


def find_segments(exits: Sequence[int]) -> tuple[Block, ...]:
    """Cuts a row into its segments, the unbranched runs of its tokens, in order.

    Args:
        exits: see packing.prefix_tree.
    """
    segments: list[Block] = []
    ancestors: list[Block] = []
    first = 0
    while first < len(exits):
        exit = exits[first]
        end = next((i for i in range(first + 1, exit) if exits[i] != exit), exit)
        while ancestors and exits[ancestors[-1].first] <= first:
            ancestors.pop()
        context: Ranges = ()
        if ancestors:
            parent = ancestors[-1]
            context = extended(parent.context, parent.first, parent.end)
        segments.append(Block(context, first, end, (end - first,)))
        ancestors.append(segments[-1])
        first = end
    return tuple(segments)


def find_blocks(segments: Sequence[Block], queries: int, siblings: int) -> Iterator[Block]:
    """Groups and cuts the segments of a row into blocks, in order.

    Args:
        segments: as find_segments returns them.
        queries: longest piece of a segment, in tokens.
        siblings: most tokens of a block of several segments.
    """
    for _, group in groupby(segments, key=lambda segment: segment.context):
        short: list[Block] = []
        for segment in group:
            lengths = [block.lengths[0] for block in (*short, segment)]
            # Padding must not add more scores than the causal mask discards in a long segment.
            padded = len(lengths) * max(lengths) ** 2 > sum(lengths) * queries
            if short and (sum(lengths) > siblings or padded):
                yield _joined(short)
                short = []
            if segment.lengths[0] > queries:
                yield from _pieces(segment, queries)
            else:
                short.append(segment)
        if short:
            yield _joined(short)


def _joined(segments: Sequence[Block]) -> Block:
    lengths = tuple(segment.lengths[0] for segment in segments)
    return Block(segments[0].context, segments[0].first, segments[-1].end, lengths)


def _pieces(segment: Block, queries: int) -> Iterator[Block]:
    context = segment.context
    for first in range(segment.first, segment.end, queries):
        end = min(first + queries, segment.end)
        yield Block(context, first, end, (end - first,))
        context = extended(context, first, end)


def row_attention(
    segments: Sequence[Block],
    exit: Tensor,
    dtype: torch.dtype,
    window: Window | None = None,
    *,
    fused: bool,
) -> tuple[BlockAttention, ...]:
    """The blocks of a row with the masks and indices that all layers share.

    Args:
        segments: of the row, as find_segments returns them.
        exit: (N,), see packing.prefix_tree.
        dtype: of the scores.
        window: of the replies; None if they attend to all tokens above.
        fused: whether they are for tree_attention.fused_attention.
    """
    if fused:
        most = WINDOWED_QUERIES if window else len(exit)
        blocks = find_blocks(segments, most, SIBLINGS)
        return tuple(_for_fused_kernels(block, exit, dtype, window) for block in blocks)
    queries = QUERIES.get(dtype, QUERIES_16_BIT)
    causal = torch.full((queries, queries), -torch.inf, dtype=dtype).triu(1)
    blocks = find_blocks(segments, queries, SIBLINGS)
    return tuple(_for_products(block, causal, window) for block in blocks)


def kept_attention(
    row: Sequence[BlockAttention],
    positions: Tensor,
    exit: Tensor,
    dtype: torch.dtype,
    window: Window | None = None,
) -> tuple[BlockAttention, ...]:
    """The blocks of a row with some of its queries alone, numbered from 0 to S.

    Args:
        row: as row_attention returns it.
        positions: (S,) of the queries, ascending; they may repeat.
        exit: (N,), see packing.prefix_tree.
        dtype: of the scores.
        window: of the replies.
    """
    kept = []
    bounds = torch.tensor([(part.block.first, part.block.end) for part in row])
    places = torch.searchsorted(positions.cpu(), bounds).tolist()
    for part, (first, end) in zip(row, places, strict=True):
        if first < end:
            context = window.context(part.block) if window else part.block.context
            start = part.block.first
            own = positions[first:end] - start
            last = int(own[-1]) + 1
            ranges = extended(context, start, start + last)
            seen = tree_mask(exit[start : start + last] - start)[0, 0, own]
            mask = _aligned_zeros(len(own), sum(e - f for f, e in ranges), dtype, exit.device)
            mask[:, -last:].masked_fill_(~seen, torch.finfo(dtype).min)
            if window:
                allowed = window.allows(start + own.unsqueeze(1), indices(ranges, exit.device))
                mask.masked_fill_(~allowed, torch.finfo(dtype).min)
            kept.append(BlockAttention(Block(context, first, end, (end - first,)), ranges, mask))
    return tuple(kept)


def _for_products(block: Block, causal: Tensor, window: Window | None) -> BlockAttention:
    """A block for matrix products; causal is (w or more, w or more), added to scores."""
    longest = max(block.lengths)
    context = window.context(block) if window else block.context
    if len(block.lengths) == 1:
        mask = causal[:longest, :longest]
        if window:
            keys = torch.arange(block.first, block.end).expand(longest, -1)
            mask = window.masked(block, context, mask, keys)
        return BlockAttention(block, extended(context, block.first, block.end), mask)
    positions = torch.cat([torch.arange(length) for length in block.lengths])
    segment = torch.arange(len(block.lengths)).repeat_interleave(torch.tensor(block.lengths))
    places = segment * longest + positions
    slots = torch.zeros(len(block.lengths) * longest, dtype=torch.int64)
    slots[places] = torch.arange(len(places))
    mask = causal[positions, :longest]
    if window:
        starts = torch.arange(block.first, block.end) - positions
        # Columns beyond the end of a short segment are hidden by the causal mask.
        keys = (starts.unsqueeze(1) + torch.arange(longest)).clamp_(max=len(window.reach) - 1)
        mask = window.masked(block, context, mask, keys)
    return BlockAttention(block, context, mask, slots, places)


def _for_fused_kernels(
    block: Block, exit: Tensor, dtype: torch.dtype, window: Window | None
) -> BlockAttention:
    """A block for fused kernels, with an additive mask if it is not causal alone.

    The mask has the scores' dtype and aligned rows, so that all layers share this tensor. From a
    bool or unaligned mask every layer would make a copy and keep it for the backward pass.
    """
    context = window.context(block) if window else block.context
    ranges = extended(context, block.first, block.end)
    bounded = window is not None and bool((window.reach[block.first : block.end] < UNBOUNDED).any())
    if len(block.lengths) == 1 and not bounded:
        return BlockAttention(block, ranges, None)
    keys, queries = sum(end - first for first, end in ranges), block.end - block.first
    mask = _aligned_zeros(queries, keys, dtype, exit.device)
    seen = tree_mask(exit[block.first : block.end] - block.first)[0, 0]
    mask[:, -queries:].masked_fill_(~seen, torch.finfo(dtype).min)
    if window:
        asked = torch.arange(block.first, block.end, device=exit.device).unsqueeze(1)
        allowed = window.allows(asked, indices(ranges, exit.device))
        mask.masked_fill_(~allowed, torch.finfo(dtype).min)
    return BlockAttention(block, ranges, mask)


def _aligned_zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns) zeros whose rows start at multiples of ALIGNMENT."""
    width = -(-columns // ALIGNMENT) * ALIGNMENT
    return torch.zeros((rows, width), dtype=dtype, device=device)[:, :columns]


def tree_mask(exit: Tensor, window: Window | None = None) -> Tensor:
    """(1, 1, N, N) bool, True where the query (row) may attend to the key (column).

    Args:
        exit: (N,), see packing.prefix_tree.
        window: of the replies.
    """
    index = torch.arange(len(exit), device=exit.device)
    query, key = index.unsqueeze(1), index.unsqueeze(0)
    seen = (key <= query) & (query < exit)
    if window:
        seen &= window.allows(query, key)
    return seen.unsqueeze(0).unsqueeze(0)


def additive_mask(exit: Tensor, dtype: torch.dtype, window: Window | None = None) -> Tensor:
    """(1, 1, N, N) additive mask, for attention implementations that take no other form.

    Args:
        exit: (N,), see packing.prefix_tree.
        dtype: of the scores.
        window: of the replies.
    """
    mask = tree_mask(exit, window)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def block_mask(exit: Tensor, window: Window | None = None, length: int | None = None) -> BlockMask:
    """The mask for FlexAttention, made without the dense (N, N) mask.

    A block of keys is attended to by the query blocks from itself up to that of its last exit. All
    queries of a later block that ends before the first exit see the whole block, so that no element
    of the mask is evaluated there.

    Args:
        exit: (N,), see packing.prefix_tree.
        window: of the replies.
        length: that the row is padded to, in tokens.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tokens = len(exit)
    length = length or tokens
    blocks = -(-length // BLOCK)
    # Padding attends to itself alone: of no score at all a kernel might make NaN.
    ends = torch.arange(1, blocks * BLOCK + 1, dtype=exit.dtype, device=exit.device)
    ends[:tokens] = exit
    # Padding keys do not keep a block from being complete.
    starts = torch.full_like(ends, blocks * BLOCK)
    starts[:tokens] = exit
    last = ends.view(blocks, BLOCK).amax(1)
    first = starts.view(blocks, BLOCK).amin(1)
    index = torch.arange(blocks, device=exit.device)
    query, key = index.unsqueeze(1), index.unsqueeze(0)
    attended = (key <= query) & (query * BLOCK < last)
    complete = attended & (key < query) & ((query + 1) * BLOCK <= first)
    depth, reach = torch.zeros_like(ends), torch.ones_like(ends)
    if window:
        depth[:tokens], reach[:tokens] = window.depth, window.reach
        depths, reaches = depth.view(blocks, BLOCK), reach.view(blocks, BLOCK)
        attended &= depths.amin(1).unsqueeze(1) < reaches.amax(1)
        complete &= depths.amax(1).unsqueeze(1) < reaches.amin(1)

    def rule(_batch: Any, _head: Any, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends[key])

    def windowed(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        return rule(batch, head, query, key) & (depth[query] < reach[key])

    return BlockMask.from_kv_blocks(
        *_indexed(attended & ~complete), *_indexed(complete), BLOCK_SIZE=BLOCK,
        mask_mod=windowed if window else rule, seq_lengths=(length, length),
    )  # fmt: skip


def _indexed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, Q) number of key blocks per query block; (1, 1, Q, K) their indices, these first."""
    counts = blocks.sum(1, dtype=torch.int32)
    indices = blocks.to(torch.int32).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None].contiguous(), indices[None, None].contiguous()
