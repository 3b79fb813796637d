"""Planned rows -> this rank's rows, encoded and packed -> their loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from vlft.data.drawing import unconditional
from vlft.errors import explaining_memory
from vlft.packing.schedule import divide, row_cost

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from vlft.data.dataset import Dataset
    from vlft.packing.batch import PackedBatch
    from vlft.packing.packer import RowPlan
    from vlft.training.job import Job
    from vlft.vision.cache import Images
    from vlft.vision.encode import RowImages


class Losses(NamedTuple):
    """Sums of losses, in nats.

    Attributes:
        total: of all targets.
        codes: the part that is of codes of drawn images.
    """

    total: float
    codes: float = 0.0


@dataclass(frozen=True)
class Row:
    """An encoded and packed row.

    Attributes:
        batch: see PackedBatch.
        images: its images, if their features were looked up already.
    """

    batch: PackedBatch
    images: RowImages | None = None

    def __len__(self) -> int:
        return len(self.batch)

    def with_features(self, images: Images) -> Row:
        """The row with the cached features of its images; pixels stay on disk until they run."""
        if images.stage == "pixels":
            return self
        return replace(self, images=images.of(self.batch.images, self.batch.codes.images))

    def pinned(self) -> Row:
        """The row in memory from which the GPU copies while it computes."""
        return Row(self.batch.pinned(), self.images and self.images.pinned())


def row_losses(job: Job, loss: torch.Tensor) -> torch.Tensor:
    """(2,) the loss of a row that ``row_loss`` has just computed, and its part of codes."""
    return torch.stack([loss.detach(), job.backend.loss.code_loss])


def row_loss(job: Job, row: Row) -> torch.Tensor:
    """Loss sum of a row in nats, a scalar."""
    images = row.images or job.images.of(row.batch.images, row.batch.codes.images)
    device = job.backend.device
    loss: torch.Tensor = job.backend.objective(row.batch.to(device), images.to(device))
    return loss


def own_rows(job: Job, data: Dataset, plans: Sequence[RowPlan]) -> list[Row]:
    """The rows of ``own_plans``, encoded and packed."""
    rows = []
    for plan in own_plans(job, plans):
        row = pack_row(job, data, plan)
        empty = replace(row, batch=row.batch.without_targets())
        rows.append(row if plan.targets else empty)
    return rows


def own_plans(job: Job, plans: Sequence[RowPlan]) -> list[RowPlan]:
    """The rows that this rank runs.

    All ranks run equally many rows, because they wait for each other after every row. A rank with
    fewer rows than another runs the shortest one without targets.
    """
    world = job.backend.world
    shares = divide([row_cost(plan.tokens) for plan in plans], world.size)
    own = [plans[index] for index in shares[world.rank]]
    shortest = min(plans, key=lambda plan: plan.tokens)
    return own + [replace(shortest, targets=0)] * (max(map(len, shares)) - len(own))


def pack_row(job: Job, data: Dataset, plan: RowPlan) -> Row:
    """A planned row with its samples encoded."""
    chat = job.images.processor.chat
    samples = [
        unconditional(data[index], chat) if index in plan.unprompted else data[index]
        for index in plan.members
    ]
    return Row(job.planner.packer.row(samples))


def explaining_row(job: Job, tokens: int) -> AbstractContextManager[None]:
    """Turns running out of memory into an error that says what to lower.

    Args:
        job: see Job.
        tokens: of the row.
    """
    limit = job.planner.packer.tokens_per_row
    lower = f"lower --tokens-per-microbatch (now {limit})"
    if tokens > limit:
        lower = "it is one sample: lower --max-length"
    return explaining_memory(
        f"with a row of {tokens} tokens",
        f"use --gradient-checkpointing if it is off, {lower}, or use --quantize nf4",
        place=str(job.backend.device),
    )
