"""Attention in a packed row: token j sees token i iff i <= j < exit[i].

A row is a sequence of trees that do not see each other. A tree is a trunk, which all of its samples
share, and branches:

    ━━━━━━━━━━━━━━━━━ trunk ━━━━━━━━━━━━━━━━━┯━ branch
                                             ├━ branch, branch        a piece: some branches
                                             └━ branch                in a row, with one mask

The trunk is plain causal attention; a piece attends to the trunk and to itself. No product is made
that a dense mask of the row would throw away between trees, and none of the row's square is held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.nn.attention.flex_attention import BlockMask

# The name of ``tree_attention`` in transformers' list.
TREE = "vlft_tree"
# Branches are taken together up to so many tokens.
PIECE = 256
# Rows of a mask start at multiples of so many elements: fused kernels copy it otherwise.
ALIGNMENT = 16
# Tokens of a side of a block.
BLOCK = 128


@dataclass(frozen=True)
class Tree:
    """The shape of a tree; places are counted from its first token.

    Attributes:
        tokens: of the tree.
        trunk: of them that all samples share.
        pieces: (first, end) of the branches that are taken together.
    """

    tokens: int
    trunk: int
    pieces: tuple[tuple[int, int], ...]


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


@dataclass(frozen=True)
class RowAttention:
    """What attention of a row needs to know, once for all layers.

    Attributes:
        trees: of the row.
        masks: of each tree's pieces, to add to their scores: (q, trunk + q).
    """

    trees: tuple[Tree, ...]
    masks: tuple[tuple[Tensor, ...], ...]


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


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row: RowAttention | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row, in the form that transformers asks for.

    Args:
        module: the layer's attention.
        query: (1, H, N, d).
        key: (1, H or fewer, N, d).
        value: (1, H or fewer, N, d of values).
        attention_mask: of what is no packed row.
        row: of the packed row; without one this is transformers' own attention.
        scaling: of the scores.
        kwargs: for transformers' own.

    Returns:
        (1, N, H, d of values), and None.
    """
    if row is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return found
    groups = query.shape[1] // key.shape[1]
    sizes = [tree.tokens for tree in row.trees]
    parts = []
    for tree, masks, queries, keys, values in zip(
        row.trees,
        row.masks,
        torch.split(query, sizes, 2),
        torch.split(repeat_kv(key, groups), sizes, 2),
        torch.split(repeat_kv(value, groups), sizes, 2),
        strict=True,
    ):
        parts += _attend(tree, masks, queries, keys, values, scaling)
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(TREE, tree_attention)
AttentionMaskInterface.register(TREE, sdpa_mask)


def _attend(
    tree: Tree,
    masks: tuple[Tensor, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
) -> list[Tensor]:
    """Attention of a tree: of its trunk, then of its pieces."""
    trunk = tree.trunk
    sizes = [trunk, *(end - first for first, end in tree.pieces)]
    queries, keys, values = (torch.split(part, sizes, 2) for part in (query, key, value))
    attend = F.scaled_dot_product_attention
    made = [attend(queries[0], keys[0], values[0], is_causal=True, scale=scaling)]
    for mask, own, of, to in zip(masks, queries[1:], keys[1:], values[1:], strict=True):
        seen, found = torch.cat([keys[0], of], 2), torch.cat([values[0], to], 2)
        made.append(attend(own, seen, found, attn_mask=mask, scale=scaling))
    return made


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
