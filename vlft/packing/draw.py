"""Which samples an epoch has, where sources have shares of it or records have weights.

A source is an endless row of passes, and each epoch takes the next samples of it: nothing repeats
before all of the source was drawn, also across epochs. A pass has each record ``floor(times)``
times and, for what is left of ``times``, once more in as many passes as that says. Which records
have one more is found by systematic sampling: the remainders lie end to end in a random order, and
a record has one more where their sum passes a whole number.

The samples of an epoch are a function of the seed and its number alone, so that a resumed run and
each of several processes find the same. Weights are whole multiples of 1 / UNIT, which keeps the
sums exact.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

UNIT = 1 << 20


@dataclass(frozen=True)
class Drawn:
    """What is drawn of a source.

    Attributes:
        members: (n,) indices of its samples.
        times: (n,) how often a pass has each on average, in units of 1 / UNIT.
        quota: samples of it that an epoch has.
        seed: of its passes.
    """

    members: Any
    times: Any
    quota: int
    seed: str

    def epoch(self, number: int) -> Iterator[int]:
        """Indices of the samples of an epoch (0-based)."""
        slot, end = number * self.quota, (number + 1) * self.quota
        while slot < end:
            one = self._pass_with(slot)
            start = self._start_of(one)
            found = self._pass(one)[slot - start : end - start]
            yield from found
            slot += len(found)

    @cached_property
    def _total(self) -> int:
        return int(self.times.sum())

    @cached_property
    def _offset(self) -> int:
        return random.Random(self.seed).randrange(UNIT)

    def _start_of(self, one: int) -> int:
        """Samples of all passes before one (0-based)."""
        return (one * self._total + self._offset) // UNIT

    def _pass_with(self, slot: int) -> int:
        """The pass that holds a place of the endless row: the first that ends behind it."""
        return -(((slot + 1) * UNIT - self._offset) // -self._total) - 1

    def _pass(self, one: int) -> list[int]:
        """The samples of a pass, shuffled."""
        generator = random.Random(f"{self.seed}/{one}")
        order = list(range(len(self.members)))
        generator.shuffle(order)
        if (self.times == UNIT).all():
            return self.members[order].tolist()  # type: ignore[no-any-return]
        # Each shift that gives the pass as many samples as it has is as likely; one that came
        # from the passes before would be the same in all of them if the sum of times is whole.
        over, size = self._total % UNIT, self._start_of(one + 1) - self._start_of(one)
        is_larger = size > self._total // UNIT
        shift = generator.randrange(*((UNIT - over, UNIT) if is_larger else (0, UNIT - over)))
        counts = np.diff((np.cumsum(self.times[order]) + shift) // UNIT, prepend=0)
        found: list[int] = np.repeat(self.members[order], counts).tolist()
        generator.shuffle(found)
        return found


@dataclass(frozen=True)
class Draw:
    """Which samples each epoch has."""

    sources: tuple[Drawn, ...]

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return sum(source.quota for source in self.sources)

    def epoch(self, number: int) -> Iterator[int]:
        """Indices of the samples of an epoch (0-based), source by source."""
        for source in self.sources:
            yield from source.epoch(number)


def drawn_by_weight(weights: Any, seed: int) -> Draw:
    """An epoch has each sample as often as its weight says.

    Args:
        weights: (S,) above 0.
        seed: of the run.
    """
    times = _units(weights)
    quota = max(1, round(int(times.sum()) / UNIT))
    return Draw((Drawn(np.arange(len(times)), times, quota, f"{seed}/weights"),))


def drawn_by_share(
    members: Sequence[Any], shares: Sequence[float], weights: Any, seed: int
) -> Draw:
    """An epoch has as many samples as there are, of each source by its share.

    Args:
        members: for each source the indices of its samples, at least one.
        shares: of the sources, relative to each other.
        weights: (S,) of all samples, above 0; they count within a source.
        seed: of the run.
    """
    made = []
    for number, (part, quota) in enumerate(
        zip(members, quotas(shares, sum(map(len, members))), strict=True)
    ):
        times = _units(weights[part])
        # A pass of fewer samples than the source has would take as long to draw.
        times = times * -(-len(part) * UNIT // int(times.sum()))
        made.append(Drawn(part, times, quota, f"{seed}/source {number}"))
    return Draw(tuple(made))


def quotas(shares: Sequence[float], samples: int) -> list[int]:
    """The samples of an epoch for each share: rounded down, the rest to the largest remainders."""
    exact = [samples * share / math.fsum(shares) for share in shares]
    counts = [math.floor(number) for number in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: samples - sum(counts)]:
        counts[index] += 1
    return counts


def _units(weights: Any) -> Any:
    return np.maximum(1, np.rint(np.asarray(weights) * UNIT)).astype(np.int64)
