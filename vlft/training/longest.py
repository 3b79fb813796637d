"""The row that is tried before step one: the longest of the run, or one that none exceeds.

To know the longest row all samples have to be encoded, in about a millisecond each; if they are
more than the store keeps, once for every epoch. Rows have at most as many tokens as their limit, or
as one sample. A row of so many tokens takes a few samples, and if it fits all rows do.
"""

from __future__ import annotations

import dataclasses
import sys
from bisect import bisect_left
from typing import TYPE_CHECKING

import numpy as np

from vlft.packing.packer import RowPlan
from vlft.packing.planner import Planner
from vlft.training.rows import pack_row

if TYPE_CHECKING:
    from vlft.data.dataset import Dataset
    from vlft.training.job import Job
    from vlft.training.rows import Row

# With at most so many samples all are encoded to find the longest row, which takes seconds.
FEW_SAMPLES = 10_000
# At most so many samples, which might exceed a row, are encoded to know their length.
MOST_ENCODED = 2_000


def longest_row(job: Job, steps: int, tokens: int | None = None) -> Row:
    """The longest row of the first steps, with another limit of a row if ``tokens`` is given."""
    planner = job.planner if tokens is None else with_limit(job, tokens)
    return pack_row(job, job.train, planner.longest_row(steps))


def bounding_row(job: Job, tokens: int | None = None) -> Row | None:
    """A row of at least as many tokens as any of the run, from the samples of its first steps.

    Args:
        job: see Job.
        tokens: another limit of a row.

    Returns:
        None if ``longest_row`` takes no longer, or there is no such bound.
    """
    planner = job.planner if tokens is None else with_limit(job, tokens)
    limit, train = planner.packer.tokens_per_row, job.train
    bounds = _bounds(train) if len(train) > FEW_SAMPLES else None
    if bounds is None:
        return None
    doubtful = np.flatnonzero(bounds > limit)
    if len(doubtful) > MOST_ENCODED:
        return None
    lengths = {index: train.outlines[index].tokens for index in doubtful.tolist()}
    longest = max(lengths, key=lengths.__getitem__, default=None)
    if longest is not None and lengths[longest] > limit:
        # It is a row of its own.
        return pack_row(job, train, RowPlan(lengths[longest], (longest,)))
    step = planner.schedule.batch_size * int(bounds.max())
    return pack_row(job, train, _row_of(planner, min(limit, step)))


def with_limit(job: Job, tokens: int) -> Planner:
    """The planner of the run, but with at most so many tokens in a row."""
    planner = job.planner
    if planner.packer.tokens_per_row == tokens:
        return planner
    packer = dataclasses.replace(planner.packer, tokens_per_row=tokens)
    return Planner(planner.schedule, packer, planner.outlines, planner.dropout)


def _bounds(data: Dataset) -> np.ndarray | None:
    """(S,) tokens that the samples have at most, exact where they are known; None if unbounded."""
    found = data.lengths.copy()
    for place in np.flatnonzero(found < 0).tolist():
        most = data.store.most_tokens(int(data.rows[place]))
        if most is None:
            return None
        found[place] = most
    return found


def _row_of(planner: Planner, tokens: int) -> RowPlan:
    """The first samples of the run in one row of at least so many tokens, or all samples."""
    packer = dataclasses.replace(
        planner.packer, tokens_per_row=sys.maxsize, joined_tokens=sys.maxsize, world_size=1
    )

    def length(count: int) -> int:
        outlines = [planner.outlines[index] for index in members[:count]]
        return packer.plan(outlines)[0].tokens

    members: list[int] = []
    for indices in planner.schedule.epoch(0):
        members += indices
        if length(len(members)) >= tokens:
            break
    before = len(members) - planner.schedule.batch_size
    counts = range(max(before, 0) + 1, len(members) + 1)
    enough = counts[min(bisect_left(counts, tokens, key=length), len(counts) - 1)]
    return RowPlan(length(enough), tuple(members[:enough]))
