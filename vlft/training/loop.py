"""The training loop: rows in, steps out, with evaluation, checkpoints and a clean stop.

The loss of a step is the sum of its targets' cross-entropies over the sum of their weights, over
all rows and processes. How samples are packed into rows and divided among processes therefore
changes memory and time, not the result.
"""

from __future__ import annotations

import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vlft.checkpoints.runs import save_checkpoint
from vlft.errors import VlftError
from vlft.packing.schedule import divide, row_cost
from vlft.training import zero
from vlft.training.interrupt import Interrupt
from vlft.training.plots import plot_run
from vlft.training.progress import RunLog, Window
from vlft.training.state import Position, optimizer_tensors, random_states, write_state

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vlft.packing.prefix_tree import PackedBatch
    from vlft.training.job import Job


def train(job: Job, position: Position) -> Position:
    """Trains from a position to the end, or to an interrupt; returns where it stopped."""
    options = job.options
    window = Window(started=time.perf_counter())
    saved_at = position.step
    encoded = 0
    trackers = job.accelerator if job.accelerator.trackers else None
    run_log = RunLog(
        job.run, options.total_steps, position.step, trackers, writes=job.world.is_rank_zero
    )
    with Interrupt() as interrupt, run_log as log:
        for step, indices in job.schedule.steps(position.step):
            if position.finished or step >= options.total_steps or asked(job, interrupt):
                break
            rows = job.packer.rows([job.train[index] for index in indices])
            learning_rate = job.scheduler.get_last_lr()[0]
            loss_sum, grad_norm = take_step(job, rows)
            window.add(loss_sum, rows)
            position.step = step + 1
            position.finished = position.step == options.total_steps
            if position.step % options.logging_steps == 0 or position.finished:
                metrics = {
                    "learning_rate": learning_rate,
                    "grad_norm": grad_norm,
                    "images_encoded": job.images.encoded - encoded,
                }
                encoded = job.images.encoded
                epoch = position.step / job.schedule.steps_per_epoch
                log.step(position.step, epoch, {**window.metrics(), **metrics})
                window = Window(started=time.perf_counter())
            paused = time.perf_counter()
            is_best = evaluate_if_due(job, position, log)
            if is_best or position.finished or position.step % options.save_steps == 0:
                save(job, position)
                saved_at = position.step
            window.started += time.perf_counter() - paused
        if position.step > saved_at:
            save(job, position)
    return position


def asked(job: Job, interrupt: Interrupt) -> bool:
    """Whether any process was asked to stop; all stop together."""
    return job.world.all_reduce(float(interrupt.asked))[0] > 0


def own_rows(job: Job, rows: list[PackedBatch]) -> list[PackedBatch]:
    """The rows that this process runs.

    All processes pass the model equally often, so that none waits for what another never sends: a
    row of weight zero stands in where there are too few.
    """
    shares = divide([row_cost(len(row)) for row in rows], job.world.size)
    mine = [rows[index] for index in shares[job.world.rank]]
    shortest = min(rows, key=len)
    idle = replace(shortest, weight=torch.zeros_like(shortest.weight))
    return mine + [idle] * (max(map(len, shares)) - len(mine))


def take_step(job: Job, rows: list[PackedBatch]) -> tuple[float, float]:
    """One optimiser step over some rows; returns its loss sum in nats and its gradient norm.

    Args:
        job: see Job.
        rows: of all processes.
    """
    (total,) = job.world.all_reduce(take_gradients(job, rows))
    if not math.isfinite(total):
        raise VlftError(
            f"the loss is {total}",
            place=str(job.run),
            hint="lower --learning-rate, or check the data; the last checkpoint is whole",
        )
    # DeepSpeed clips and steps at once, unless the norm is not finite.
    norm = zero.step(job.objective) if job.world.zero_stage else clip(job)
    # With a gradient scaler such a step is skipped, and the scale lowered.
    if job.accelerator.scaler is None and not math.isfinite(norm):
        raise VlftError(
            f"the gradient norm is {norm}",
            place=str(job.run),
            hint="lower --learning-rate; the last checkpoint is whole",
        )
    if not job.world.zero_stage:
        job.optimizer.step()
    job.scheduler.step()
    return total, norm


def take_gradients(job: Job, rows: list[PackedBatch]) -> float:
    """Gradients of a step, new ones; returns the loss sum of this process's rows, in nats.

    Args:
        job: see Job.
        rows: of all processes.
    """
    job.objective.train()
    job.optimizer.zero_grad()
    # Gradients are averaged over the processes, and summed is what is wanted.
    scale = job.world.size / sum(float(row.weight.sum()) for row in rows)
    total = 0.0
    mine = own_rows(job, rows)
    for left, row in zip(reversed(range(len(mine))), mine, strict=True):
        # Gradients travel once, with the last row.
        total += backward(job, row, scale, travel=left == 0)
    return total


def backward(job: Job, row: PackedBatch, scale: float, *, travel: bool) -> float:
    """Adds the gradients of a row, scaled; returns its loss sum.

    Args:
        job: see Job.
        row: one.
        scale: of the gradients.
        travel: whether the processes' gradients are brought together now.

    Raises:
        VlftError: it does not fit into memory.
    """
    with nullcontext() if travel else job.accelerator.no_sync(job.objective), fitting(job, row):
        loss = row_loss(job, row)
        if job.world.zero_stage:
            zero.backward(job.objective, loss * scale, last=travel)
        else:
            job.accelerator.backward(loss * scale)
    return loss.item()


@contextmanager
def fitting(job: Job, row: PackedBatch) -> Iterator[None]:
    """Says what to do if a row does not fit into memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        limit = job.packer.tokens_per_row
        lower = f"lower --tokens-per-microbatch (now {limit})"
        if len(row) > limit:
            lower = "it is one sample: lower --max-length"
        raise VlftError(
            f"out of memory with a row of {len(row)} tokens",
            place=str(job.accelerator.device),
            hint=f"use --gradient-checkpointing if it is off, {lower}, or use --quantize nf4",
        ) from error


def clip(job: Job) -> float:
    """Clips the gradients if asked to; returns their norm before."""
    limit = job.options.max_grad_norm or math.inf
    # All of the objective's: Accelerate tells by them which model is meant.
    return float(job.accelerator.clip_grad_norm_(job.objective.parameters(), limit))


def row_loss(job: Job, row: PackedBatch) -> torch.Tensor:
    """Loss sum of a row, in nats."""
    device = job.accelerator.device
    images = job.images.of(row.images)
    loss: torch.Tensor = job.objective(row.to(device), images.to(device))
    return loss


@torch.no_grad()
def evaluate(job: Job) -> float:
    """Loss of the validation set, in nats per supervised token."""
    job.objective.eval()
    loss, weight = 0.0, 0.0
    for start in range(0, len(job.val), job.options.batch_size):
        samples = list(job.val[start : start + job.options.batch_size])
        rows = job.packer.rows(samples)
        for row in own_rows(job, rows):
            with fitting(job, row):
                loss += row_loss(job, row).item()
        weight += sum(float(row.weight.sum()) for row in rows)
    return job.world.all_reduce(loss)[0] / weight


def evaluate_if_due(job: Job, position: Position, log: RunLog) -> bool:
    """Evaluates at its steps and at the end; returns whether the loss is the best so far."""
    due = position.step % job.options.eval_steps == 0 or position.finished
    if not due or not len(job.val):
        return False
    loss = evaluate(job)
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


def save(job: Job, position: Position) -> None:
    """Writes a checkpoint of this position, then the curves."""
    position.scheduler = dict(job.scheduler.state_dict())
    scaler = job.accelerator.scaler
    position.scaler = dict(scaler.state_dict()) if scaler is not None else {}

    # What all processes must do, before the first one writes.
    randoms = job.world.all_gather(random_states())
    taking_part = job.world.is_rank_zero or job.world.sharded
    moments = optimizer_tensors(job.optimizer, job.model, job.world) if taking_part else {}
    write_weights = job.gather_weights()

    def write(folder: Path) -> None:
        write_weights(folder)
        write_state(folder, position, randoms, moments)

    def save_and_plot() -> None:
        save_checkpoint(
            job.run,
            position.step,
            write,
            keep=job.options.save_total_limit,
            best_step=position.best_step,
        )
        plot_run(job.run)

    job.world.on_rank_zero(save_and_plot)
