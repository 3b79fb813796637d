"""The training loop: rows in, steps out, with evaluation, checkpoints and a clean stop.

The loss of a step is the sum of its targets' cross-entropies over the sum of their weights, over
all rows and ranks. How samples are packed into rows and rows divided among ranks therefore changes
memory and time, not the result.
"""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from vlft.errors import VlftError
from vlft.packing.schedule import divide, row_cost
from vlft.training.interrupt import Interrupt
from vlft.training.progress import RunLog, Window

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vlft.data.dataset import Dataset
    from vlft.packing.packer import RowPlan
    from vlft.packing.prefix_tree import PackedBatch
    from vlft.training.checkpointer import Checkpointer
    from vlft.training.job import Job, LoopOptions
    from vlft.training.state import Position


def train(job: Job, position: Position, checkpointer: Checkpointer, log: RunLog) -> Position:
    """Trains from a position to the end, or to an interrupt; returns where it stopped."""
    saved_at = position.step
    encoded = 0
    window = Window(started=time.perf_counter())
    with Interrupt() as interrupt, log:
        if position.step == 0 and len(job.val) > 0:
            log.evaluation(0, evaluate(job), is_best=False)
        for plans in job.planner.steps(position.step):
            if position.finished or _stop_requested(job, interrupt):
                break
            learning_rate = job.backend.scheduler.get_last_lr()[0]
            loss_sum, grad_norm = take_step(job, plans)
            window.add(loss_sum, plans)
            position.step += 1
            now = due(position.step, job.options, validates=len(job.val) > 0)
            position.finished = now.finish
            if now.log:
                metrics = {
                    "learning_rate": learning_rate,
                    "grad_norm": grad_norm,
                    "images_encoded": job.images.encoded - encoded,
                }
                encoded = job.images.encoded
                epoch = position.step / job.planner.schedule.steps_per_epoch
                log.step(position.step, epoch, {**window.metrics(), **metrics})
                window = Window(started=time.perf_counter())
            else:
                log.advance(position.step)
            paused = time.perf_counter()
            is_best = now.evaluate and _evaluate_and_note(job, position, log)
            if now.save or is_best or position.finished:
                checkpointer.save(position)
                saved_at = position.step
            window.started += time.perf_counter() - paused
        if position.step > saved_at:
            checkpointer.save(position)
    return position


@dataclass(frozen=True)
class Due:
    """What follows a step."""

    log: bool
    evaluate: bool
    save: bool
    finish: bool


def due(step: int, options: LoopOptions, *, validates: bool) -> Due:
    """What follows a step, by its number alone.

    Args:
        step: steps done so far.
        options: of the loop.
        validates: whether there is a validation set.
    """
    finish = step >= options.total_steps
    return Due(
        log=finish or step % options.logging_steps == 0,
        evaluate=validates and (finish or step % options.eval_steps == 0),
        save=finish or step % options.save_steps == 0,
        finish=finish,
    )


def _stop_requested(job: Job, interrupt: Interrupt) -> bool:
    """Whether any rank was asked to stop; all ranks stop at the same step."""
    return job.backend.world.all_reduce(float(interrupt.asked))[0] > 0


def take_step(job: Job, plans: Sequence[RowPlan]) -> tuple[float, float]:
    """One optimiser step.

    Args:
        job: see Job.
        plans: the rows of the step, those of all ranks.

    Returns:
        The loss sum of the step in nats, and the norm of its gradients before clipping.

    Raises:
        VlftError: loss or gradients are not finite.
    """
    job.backend.zero_grad()
    (total,) = job.backend.world.all_reduce(take_gradients(job, plans))
    if not math.isfinite(total):
        raise VlftError(
            f"the loss is {total}",
            place="training",
            hint="lower --learning-rate, or check the data",
        )
    norm = job.backend.step()
    if not math.isfinite(norm) and not job.backend.scales_gradients:
        raise VlftError(
            f"the gradient norm is {norm}", place="training", hint="lower --learning-rate"
        )
    return total, norm


def take_gradients(job: Job, plans: Sequence[RowPlan]) -> float:
    """Adds the gradients of a step; returns the loss sum of this rank's rows in nats.

    Args:
        job: see Job.
        plans: the rows of the step, those of all ranks.
    """
    backend = job.backend
    backend.objective.train()
    # Ranks average their gradients, but the step needs their sum.
    scale = backend.world.size / sum(plan.targets for plan in plans)
    total = 0.0
    rows = own_rows(job, job.train, plans)
    for number, row in enumerate(rows, start=1):
        last = number == len(rows)
        with backend.accumulate(last=last), explaining_memory(job, row):
            loss = row_loss(job, row)
            backend.backward(loss * scale, last=last)
        total += loss.item()
    return total


def row_loss(job: Job, row: PackedBatch) -> torch.Tensor:
    """Loss sum of a row in nats, a scalar."""
    images = job.images.of(row.images)
    device = job.backend.device
    loss: torch.Tensor = job.backend.objective(row.to(device), images.to(device))
    return loss


def own_rows(job: Job, data: Dataset, plans: Sequence[RowPlan]) -> list[PackedBatch]:
    """The rows that this rank runs, encoded and packed.

    All ranks run equally many rows, because they wait for each other after every row. A rank with
    fewer rows than another runs the shortest one with weight zero.
    """
    world = job.backend.world
    shares = divide([row_cost(plan.tokens) for plan in plans], world.size)
    rows = [pack_row(job, data, plans[index]) for index in shares[world.rank]]
    missing = max(map(len, shares)) - len(rows)
    if missing:
        shortest = pack_row(job, data, min(plans, key=lambda plan: plan.tokens))
        rows += [replace(shortest, weight=torch.zeros_like(shortest.weight))] * missing
    return rows


def pack_row(job: Job, data: Dataset, plan: RowPlan) -> PackedBatch:
    """A planned row with its samples encoded."""
    return job.planner.packer.row([data[index] for index in plan.members])


@contextmanager
def explaining_memory(job: Job, row: PackedBatch) -> Iterator[None]:
    """Turns running out of memory into an error that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        limit = job.planner.packer.tokens_per_row
        lower = f"lower --tokens-per-microbatch (now {limit})"
        if len(row) > limit:
            lower = "it is one sample: lower --max-length"
        raise VlftError(
            f"out of memory with a row of {len(row)} tokens",
            place=str(job.backend.device),
            hint=f"use --gradient-checkpointing if it is off, {lower}, or use --quantize nf4",
        ) from error


@torch.no_grad()
def evaluate(job: Job) -> float:
    """Loss of the validation set, in nats per supervised token."""
    job.backend.objective.eval()
    loss, targets = 0.0, 0
    size = job.options.batch_size
    for start in range(0, len(job.val), size):
        batch = job.val[start : start + size]
        plans = job.planner.packer.plan(batch.outlines)
        for row in own_rows(job, batch, plans):
            with explaining_memory(job, row):
                loss += row_loss(job, row).item()
        targets += sum(plan.targets for plan in plans)
    return job.backend.world.all_reduce(loss)[0] / targets


def _evaluate_and_note(job: Job, position: Position, log: RunLog) -> bool:
    """Evaluates and notes the result in the position; returns whether it is the best so far."""
    loss = evaluate(job)
    position.last_loss, position.evaluated_step = loss, position.step
    is_best = math.isfinite(loss) and (position.best_loss is None or loss < position.best_loss)
    if is_best:
        position.best_loss, position.best_step = loss, position.step
        position.evaluations_without_best = 0
    else:
        position.evaluations_without_best += 1
    log.evaluation(position.step, loss, is_best=is_best)
    patience = job.options.early_stop
    if patience is not None and position.evaluations_without_best >= patience:
        log.note(f"no better loss in {patience} evaluations; stopping early")
        position.finished = True
    return is_best
