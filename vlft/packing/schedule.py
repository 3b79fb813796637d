"""Samples -> epochs -> optimiser steps, and rows -> ranks.

group   samples that share an image, shuffled, in pieces of at most half a step
epoch   the pieces of all groups, shuffled
step    the next ``batch_size`` samples
row     see packing.packer

A group stays together because its shared prefix then runs once per row. Its pieces are limited
because a step on one image alone would learn less than a step of the same size on many;
``python -m benchmarks quality`` compares both orders.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from collections.abc import Hashable

    from vlft.packing.draw import Draw

# Row length in tokens at which attention costs as much as all linear layers together: about six
# times the hidden size of the LLM.
EVEN_TOKENS = 12_000


@dataclass(frozen=True)
class Schedule:
    """The order of the samples of a run; it depends on the seed and on nothing else.

    Attributes:
        groups: one key per sample; samples with equal keys stay together, up to half a step. With
            a key of its own for each sample the samples are shuffled freely.
        batch_size: samples per optimiser step.
        seed: random seed of the shuffling.
        draw: which samples an epoch has; None for each once.
    """

    groups: Sequence[Hashable]
    batch_size: int
    seed: int
    draw: Draw | None = None

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return len(self.groups) if self.draw is None else self.draw.samples

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch; the last may have fewer samples."""
        return -(-self.samples // self.batch_size)

    def epoch(self, number: int) -> Sequence[list[int]]:
        """The sample indices of every step of an epoch (0-based)."""
        members: dict[Hashable, list[int]] = {}
        if self.draw is None:
            for index, key in enumerate(self.groups):
                members.setdefault(key, []).append(index)
        else:
            # Copies of a sample are in groups of their own: in one step they teach nothing more.
            copies: Counter[int] = Counter()
            for index in self.draw.epoch(number):
                members.setdefault((copies[index], self.groups[index]), []).append(index)
                copies[index] += 1
        generator = random.Random(f"{self.seed}/{number}")
        pieces: list[list[int]] = []
        for group in members.values():
            generator.shuffle(group)
            pieces += _pieces(group, max(1, self.batch_size // 2))
        generator.shuffle(pieces)
        return Steps(array("q", chain.from_iterable(pieces)), self.batch_size)


class Steps(Sequence[list[int]]):
    """The sample indices of each step of an epoch, eight bytes a sample.

    Args:
        order: of the samples.
        size: samples per step; the last step may have fewer.
    """

    def __init__(self, order: array[int], size: int) -> None:
        self._order, self._size = order, size

    def __len__(self) -> int:
        return -(-len(self._order) // self._size)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        """The samples of a step, or of some steps."""
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._order[index * self._size : (index + 1) * self._size].tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Steps) and (self._order, self._size) == (
            other._order,
            other._size,
        )

    __hash__ = None  # type: ignore[assignment]


def _pieces(group: list[int], most: int) -> list[list[int]]:
    """The group cut into as few pieces of at most ``most`` samples as it takes, of even size."""
    count = -(-len(group) // most)
    bounds = [len(group) * number // count for number in range(count + 1)]
    return [group[start:end] for start, end in pairwise(bounds)]


def divide(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Which rows each rank runs, longest first to the rank with the least work so far.

    No rank gets more than ``ceil(rows / world_size)`` rows, because the ranks wait for each other
    after every row.

    Args:
        costs: of the rows, see row_cost.
        world_size: number of ranks.
    """
    most = -(-len(costs) // world_size)
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        open_shares = [share for share in shares if len(share) < most]
        min(open_shares, key=lambda share: sum(costs[i] for i in share)).append(index)
    return shares


def row_cost(tokens: int) -> float:
    """Cost of a row in token equivalents: linear layers, and attention, which is quadratic."""
    return tokens + tokens * tokens / EVEN_TOKENS
