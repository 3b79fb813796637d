"""The rows of every step of a run, planned from outlines step by step."""

from __future__ import annotations

from dataclasses import replace
from itertools import count, islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vlft.data.outline import Outline
    from vlft.packing.dropout import PromptDropout
    from vlft.packing.packer import Packer, RowPlan
    from vlft.packing.schedule import Schedule

# Steps whose rows are kept; a row plan takes about a hundred bytes per sample.
STEPS_KEPT = 4096


class Planner:
    """Plans the rows of a run's steps; the loop, the autotuner and ``vlft plan`` share it.

    Args:
        schedule: which samples each step has.
        packer: how they become rows.
        outlines: of all training samples.
        dropout: of the prompts of drawn images; None for none.
    """

    def __init__(
        self,
        schedule: Schedule,
        packer: Packer,
        outlines: Sequence[Outline],
        dropout: PromptDropout | None = None,
    ) -> None:
        self.schedule = schedule
        self.packer = packer
        self.outlines = outlines
        self.dropout = dropout
        self._epochs: dict[int, Sequence[list[int]]] = {}
        self._rows: dict[int, list[RowPlan]] = {}

    def rows(self, indices: Sequence[int], epoch: int = 0) -> list[RowPlan]:
        """The rows of one step, longest first; their members are indices of training samples."""
        outlines = [self.outlines[index] for index in indices]
        dropped: set[int] = set()
        if self.dropout is not None:
            pairs = zip(indices, outlines, strict=True)
            dropped = {index for index, item in pairs if self.dropout.drops(epoch, index, item)}
            outlines = [
                self.dropout.outline(item) if index in dropped else item
                for index, item in zip(indices, outlines, strict=True)
            ]
        rows = []
        for plan in self.packer.plan(outlines):
            members = tuple(indices[i] for i in plan.members)
            unprompted = tuple(index for index in members if index in dropped)
            rows.append(replace(plan, members=members, unprompted=unprompted))
        return rows

    def step(self, number: int) -> list[RowPlan]:
        """The rows of a step of the run (0-based)."""
        if number not in self._rows:
            if len(self._rows) == STEPS_KEPT:
                del self._rows[next(iter(self._rows))]
            epoch, index = divmod(number, self.schedule.steps_per_epoch)
            if epoch not in self._epochs:
                # Only the current epoch is kept: the order of a million samples takes tens of MB.
                self._epochs = {epoch: self.schedule.epoch(epoch)}
            self._rows[number] = self.rows(self._epochs[epoch][index], epoch)
        return self._rows[number]

    def steps(self, first: int = 0) -> Iterator[list[RowPlan]]:
        """The rows of each step without end, from a 0-based step on."""
        return map(self.step, count(first))

    def longest_row(self, steps: int) -> RowPlan:
        """The longest row of the first steps of the run."""
        return max((rows[0] for rows in islice(self.steps(), steps)), key=lambda row: row.tokens)
