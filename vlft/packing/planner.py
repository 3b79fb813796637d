"""The rows of every step of a run, planned from outlines before any sample is encoded."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vlft.data.encode import Outline
    from vlft.packing.packer import Packer, RowPlan
    from vlft.packing.schedule import Schedule

# Epochs whose rows are kept; a row plan takes about a hundred bytes per sample.
EPOCHS_KEPT = 4


class Planner:
    """Plans the rows of a run's steps; the loop, the autotuner and ``vlft plan`` share it.

    Args:
        schedule: which samples each step has.
        packer: how they become rows.
        outlines: of all training samples.
    """

    def __init__(self, schedule: Schedule, packer: Packer, outlines: Sequence[Outline]) -> None:
        self.schedule = schedule
        self.packer = packer
        self.outlines = outlines
        self._epochs: dict[int, list[list[RowPlan]]] = {}

    def rows(self, indices: Sequence[int]) -> list[RowPlan]:
        """The rows of one step, longest first; their members are indices of training samples."""
        plans = self.packer.plan([self.outlines[index] for index in indices])
        return [replace(plan, members=tuple(indices[i] for i in plan.members)) for plan in plans]

    def epoch(self, number: int) -> list[list[RowPlan]]:
        """The rows of every step of an epoch (0-based). An epoch is planned once."""
        if number not in self._epochs:
            if len(self._epochs) == EPOCHS_KEPT:
                del self._epochs[min(self._epochs)]
            self._epochs[number] = [self.rows(indices) for indices in self.schedule.epoch(number)]
        return self._epochs[number]

    def steps(self, first: int = 0) -> Iterator[list[RowPlan]]:
        """The rows of each step without end, from a 0-based step on."""
        number, offset = divmod(first, self.schedule.steps_per_epoch)
        while True:
            yield from self.epoch(number)[offset:]
            number, offset = number + 1, 0

    def longest_row(self, steps: int) -> RowPlan:
        """The longest row of the first steps of the run."""
        return max((rows[0] for rows in islice(self.steps(), steps)), key=lambda row: row.tokens)
