"""A row's exits -> its trees and masks: token j attends to token i iff i <= j < exit[i]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlft.models.tree_attention import RowAttention, Tree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.nn.attention.flex_attention import BlockMask

# Branches are computed together up to this many tokens.
PIECE = 256
# Fused kernels copy a mask whose rows do not start at a multiple of this many elements.
ALIGNMENT = 16
# Side of a FlexAttention block in tokens.
BLOCK = 128


def find_trees(exits: Sequence[int]) -> tuple[Tree, ...]:
    """The trees of a row, in order.

    Args:
        exits: see packing.prefix_tree.
    """
    trees = []
    start = 0
    while start < len(exits):
        end = exits[start]
        trunk = next((i for i in range(start, end) if exits[i] != end), end)
        pieces = []
        first = branch = trunk
        while branch < end:
            branch = exits[branch]
            if branch - first >= PIECE or branch == end:
                pieces.append((first - start, branch - start))
                first = branch
        trees.append(Tree(end - start, trunk - start, tuple(pieces)))
        start = end
    return tuple(trees)


def row_attention(trees: tuple[Tree, ...], exit: Tensor, dtype: torch.dtype) -> RowAttention:
    """Trees and masks of a row, for all layers.

    Args:
        trees: of the row.
        exit: (N,), see packing.prefix_tree.
        dtype: of the scores.
    """
    masks = []
    start = 0
    for tree in trees:
        masks.append(
            tuple(
                _piece_mask(exit[start + first : start + end] - (start + first), tree.trunk, dtype)
                for first, end in tree.pieces
            )
        )
        start += tree.tokens
    return RowAttention(trees, tuple(masks))


def _piece_mask(exit: Tensor, trunk: int, dtype: torch.dtype) -> Tensor:
    """(q, trunk + q) additive mask: 0 for the trunk and for a token's own path.

    It has the scores' dtype and aligned rows, so that all layers share this tensor. From a bool or
    unaligned mask every layer would make a copy and keep it for the backward pass.
    """
    length = len(exit)
    padded = torch.zeros((length, _aligned(trunk + length)), dtype=dtype, device=exit.device)
    mask = padded[:, : trunk + length]
    mask[:, trunk:].masked_fill_(~tree_mask(exit)[0, 0], torch.finfo(dtype).min)
    return mask


def tree_mask(exit: Tensor) -> Tensor:
    """(1, 1, N, N) bool, True where the query (row) may attend to the key (column).

    Args:
        exit: (N,), see packing.prefix_tree.
    """
    index = torch.arange(len(exit), device=exit.device)
    query, key = index.unsqueeze(1), index.unsqueeze(0)
    return ((key <= query) & (query < exit)).unsqueeze(0).unsqueeze(0)


def additive_mask(exit: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, 1, N, N) additive mask, for attention implementations that take no other form.

    Args:
        exit: (N,), see packing.prefix_tree.
        dtype: of the scores.
    """
    mask = tree_mask(exit)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def block_mask(exit: Tensor) -> BlockMask:
    """The mask for FlexAttention, made without the dense (N, N) mask.

    A block of keys is attended to by the query blocks from itself up to that of its last exit. All
    queries of a later block that ends before the first exit see the whole block, so that no element
    of the mask is evaluated there.

    Args:
        exit: (N,), see packing.prefix_tree.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = len(exit)
    blocks = -(-length // BLOCK)
    # Padding attends to nothing.
    ends = torch.zeros(blocks * BLOCK, dtype=exit.dtype, device=exit.device)
    ends[:length] = exit
    # Padding keys do not keep a block from being complete.
    starts = torch.full_like(ends, blocks * BLOCK)
    starts[:length] = exit
    last = ends.view(blocks, BLOCK).amax(1)
    first = starts.view(blocks, BLOCK).amin(1)
    index = torch.arange(blocks, device=exit.device)
    query, key = index.unsqueeze(1), index.unsqueeze(0)
    attended = (key <= query) & (query * BLOCK < last)
    complete = (key < query) & ((query + 1) * BLOCK <= first)

    def rule(_batch: Any, _head: Any, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends[key])

    return BlockMask.from_kv_blocks(
        *_indexed(attended & ~complete), *_indexed(complete), BLOCK_SIZE=BLOCK, mask_mod=rule,
        seq_lengths=(length, length),
    )  # fmt: skip


def _indexed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, Q) number of key blocks per query block; (1, 1, Q, K) their indices, these first."""
    counts = blocks.sum(1, dtype=torch.int32)
    indices = blocks.to(torch.int32).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None].contiguous(), indices[None, None].contiguous()
