"""A row's exits -> its trees and masks: token j sees token i iff i <= j < exit[i]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlft.models.tree_attention import RowAttention, Tree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.nn.attention.flex_attention import BlockMask

# Branches are taken together up to so many tokens.
PIECE = 256
# Rows of a mask start at multiples of so many elements: fused kernels copy it otherwise.
ALIGNMENT = 16
# Tokens of a side of a block.
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
    """The masks of a row's pieces.

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
    """(q, trunk + q): the trunk is seen, the rest by the rule.

    In the scores' dtype and aligned, attention of every layer keeps this one tensor; of a mask of
    bools, or of one out of line, each layer would make and keep a copy.
    """
    length = len(exit)
    room = torch.zeros((length, _aligned(trunk + length)), dtype=dtype, device=exit.device)
    mask = room[:, : trunk + length]
    mask[:, trunk:].masked_fill_(~tree_mask(exit)[0, 0], torch.finfo(dtype).min)
    return mask


def tree_mask(exit: Tensor) -> Tensor:
    """(1, 1, N, N) bool, True where the query (row) may see the key (column).

    Args:
        exit: (N,), see packing.prefix_tree.
    """
    index = torch.arange(len(exit), device=exit.device)
    query, key = index.unsqueeze(1), index.unsqueeze(0)
    return ((key <= query) & (query < exit)).unsqueeze(0).unsqueeze(0)


def additive_mask(exit: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, 1, N, N) numbers to add to the scores: 0 where the query may see the key.

    For attention that takes nothing else.

    Args:
        exit: (N,), see packing.prefix_tree.
        dtype: of the scores.
    """
    mask = tree_mask(exit)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def block_mask(exit: Tensor) -> BlockMask:
    """The mask for FlexAttention, without ever making it dense.

    The keys of a block are seen by the queries of the blocks from itself to that of its last exit;
    in the blocks before its first exit by all of them, so that nothing need be compared there.

    Args:
        exit: (N,), see packing.prefix_tree.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = len(exit)
    blocks = -(-length // BLOCK)
    # Beyond the row nobody is seen.
    ends = torch.zeros(blocks * BLOCK, dtype=exit.dtype, device=exit.device)
    ends[:length] = exit
    # What is beyond the row does not keep a block from being whole.
    starts = torch.full_like(ends, blocks * BLOCK)
    starts[:length] = exit
    last = ends.view(blocks, BLOCK).amax(1)
    first = starts.view(blocks, BLOCK).amin(1)
    index = torch.arange(blocks, device=exit.device)
    query, key = index.unsqueeze(1), index.unsqueeze(0)
    seen = (key <= query) & (query * BLOCK < last)
    whole = (key < query) & ((query + 1) * BLOCK <= first)

    def rule(_batch: Any, _head: Any, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends[key])

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=rule,
        seq_lengths=(length, length),
    )  # fmt: skip


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, Q) how many key blocks each query block has, and (1, 1, Q, K) which come first."""
    counts = blocks.sum(1, dtype=torch.int32)
    places = blocks.to(torch.int32).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None].contiguous(), places[None, None].contiguous()
