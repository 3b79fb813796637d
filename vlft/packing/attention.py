"""The attention mask of a packed row: token j sees token i iff i <= j < exit[i]."""

from __future__ import annotations

import torch
from torch import Tensor


def tree_mask(exit: Tensor) -> Tensor:
    """(1, 1, N, N) bool, True where the query (row) may see the key (column).

    Args:
        exit: (N,), see packing.prefix_tree.
    """
    index = torch.arange(len(exit), device=exit.device)
    query, key = index.unsqueeze(1), index.unsqueeze(0)
    return ((key <= query) & (query < exit)).unsqueeze(0).unsqueeze(0)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers to add to the scores, for attention that takes no bool."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
