"""Replies with a window: a token attends to its prompt and to the last tokens of its own reply.

In Unlimited-OCR, on a path of a prompt and a reply, token j attends to token i iff i <= j and (i
is in the prompt or j - i < window). In a row that is a bound for each token: its reach, the first
depth that does not attend to it.

    prompt p p p, reply a b c d e, window 2      depth   0  1  2  3  4  5  6  7
                                                 token   p  p  p  a  b  c  d  e
                                                 reach   ∞  ∞  ∞  5  6  7  8  9
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from vlft.models.tree_attention import extended

if TYPE_CHECKING:
    from torch import Tensor

    from vlft.models.tree_attention import Block, Ranges

# The reach of a prompt's tokens: every token below attends to them.
UNBOUNDED = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Window:
    """The tokens of a row and how far down each is attended to.

    Attributes:
        depth: (N,) int64, position of each token on its own path.
        reach: (N,) int64, the first depth that does not attend to it.
    """

    depth: Tensor
    reach: Tensor

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries may attend to keys, by their indices and as far as depths say."""
        return self.depth[query] < self.reach[key]

    def context(self, block: Block) -> Ranges:
        """The tokens of a block's context that any of its queries attends to."""
        found: Ranges = ()
        for first, end in block.context:
            seen = (self.reach[first:end] > self.depth[block.first]).tolist()
            start = first
            for attended, run in groupby(seen):
                stop = start + sum(1 for _ in run)
                if attended:
                    found = extended(found, start, stop)
                start = stop
        return found

    def masked(self, block: Block, context: Ranges, own: Tensor, keys: Tensor) -> Tensor:
        """The mask of a block's last columns: those of replies in its context, then its own.

        Args:
            block: of n queries.
            context: as ``context`` returns it.
            own: (n, w) additive mask of the columns of its own segments.
            keys: (n, w), the indices of their tokens in the row.
        """
        above = indices(context, keys.device)
        above = above[self.reach[above] < UNBOUNDED]
        queries = torch.arange(block.first, block.end, device=keys.device).unsqueeze(1)
        keys = torch.cat([above.expand(len(queries), -1), keys], 1)
        mask = torch.cat([own.new_zeros(len(queries), len(above)), own], 1)
        return mask.masked_fill(~self.allows(queries, keys), -torch.inf)


def indices(ranges: Ranges, device: torch.device) -> Tensor:
    """The tokens of some ranges, in order."""
    runs = [torch.arange(first, end, device=device) for first, end in ranges]
    return torch.cat(runs) if runs else torch.arange(0, device=device)
