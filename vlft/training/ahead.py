"""The next step's rows, prepared by a thread while the model computes a step.

On a GPU the main thread starts kernels; whatever else it does, the GPU may have to wait for. What a
row holds does not depend on when it is made, so that a run is the same as without the thread.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from vlft.training.rows import own_rows

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from concurrent.futures import Future

    from vlft.packing.packer import RowPlan
    from vlft.training.job import Job
    from vlft.training.rows import Row

    Prepared = tuple[list[RowPlan], list[Row]]


class Ahead:
    """Steps with their rows, one step ahead."""

    def __init__(self) -> None:
        self._plans: Sequence[RowPlan] | None = None
        self._rows: list[Row] = []

    def steps(self, job: Job, first: int) -> Generator[list[RowPlan]]:
        """The planned rows of each step of the run, from a 0-based step on; see ``rows``."""
        with ThreadPoolExecutor(1, thread_name_prefix="vlft-rows") as pool:
            following = pool.submit(_prepare, job, first)
            for number in range(first, job.options.total_steps):
                plans, rows = _result(following, job, number)
                if number + 1 < job.options.total_steps:
                    following = pool.submit(_prepare, job, number + 1)
                self._plans, self._rows = plans, rows
                yield plans

    def rows(self, job: Job, plans: Sequence[RowPlan]) -> list[Row]:
        """This rank's rows of a step: those that are ready, else they are made now."""
        if plans is not self._plans or not self._rows:
            return own_rows(job, job.train, plans)
        rows, self._rows = self._rows, []
        return rows


def _prepare(job: Job, number: int) -> Prepared:
    plans = job.planner.step(number)
    on_gpu = job.backend.device.type == "cuda"
    rows = [row.with_features(job.images) for row in own_rows(job, job.train, plans)]
    return plans, [row.pinned() for row in rows] if on_gpu else rows


def _result(prepared: Future[Prepared], job: Job, number: int) -> Prepared:
    """What the thread has made.

    If it failed only the plan is returned: before its rows are made the loop checks whether images
    have changed, and then stops in good order.
    """
    if prepared.exception() is None:
        return prepared.result()
    return job.planner.step(number), []
