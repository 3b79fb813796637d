"""Attention over a packed row, registered with transformers as an attention implementation.

A row is a sequence of trees that do not attend to each other. A tree is a trunk, the prefix that
all of its samples share, and branches:

    ━━━━━━━━━━━━━━━━━ trunk ━━━━━━━━━━━━━━━━━┯━ branch
                                             ├━ branch, branch        a piece: some branches
                                             └━ branch                in a row, with one mask

The trunk is plain causal attention; a piece attends to the trunk and to itself. Scores between
trees, which a dense mask would discard, are never computed, and no (N, N) mask of the row is held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from torch import Tensor, nn

# The name under which ``tree_attention`` is registered with transformers.
TREE = "vlft_tree"


@dataclass(frozen=True)
class Tree:
    """The shape of a tree: its length, and those of its parts, in tokens."""

    tokens: int
    trunk: int
    pieces: tuple[tuple[int, int], ...]  # (first, end), counted from the tree's first token


@dataclass(frozen=True)
class RowAttention:
    """A row's trees and masks, made once for all layers."""

    trees: tuple[Tree, ...]
    # For each tree, for each of its pieces: (q, trunk + q), added to the scores.
    masks: tuple[tuple[Tensor, ...], ...]


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
    """Tree attention if the call carries a packed row, else transformers' own SDPA.

    query (1, H, N, d), key (1, H or fewer, N, d), value (1, H or fewer, N, d_v) -> (1, N, H, d_v)
    and None in place of attention weights. The signature is that of transformers' attention
    functions; attention_mask is for calls without a packed row.
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
    """(1, H, n, d_v) outputs of a tree's trunk, then of each of its pieces."""
    trunk = tree.trunk
    sizes = [trunk, *(end - first for first, end in tree.pieces)]
    queries, keys, values = (torch.split(part, sizes, 2) for part in (query, key, value))
    attend = F.scaled_dot_product_attention
    made = [attend(queries[0], keys[0], values[0], is_causal=True, scale=scaling)]
    for mask, own, of, to in zip(masks, queries[1:], keys[1:], values[1:], strict=True):
        seen, found = torch.cat([keys[0], of], 2), torch.cat([values[0], to], 2)
        made.append(attend(own, seen, found, attn_mask=mask, scale=scaling))
    return made
