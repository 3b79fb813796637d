"""The training loop: rows in, steps out, with evaluation, checkpoints and a clean stop.

The loss of a step is the sum of its targets' cross-entropies over the sum of their weights, over
all rows. How samples are packed into rows therefore changes memory and time, not the result.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlft import console
from vlft.checkpoints.runs import save_checkpoint
from vlft.errors import VlftError
from vlft.packing.schedule import Schedule, pack_rows
from vlft.training.plots import plot_run
from vlft.training.progress import RunLog, Window
from vlft.training.state import Position, write_state

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import FrameType

    from vlft.data.dataset import Dataset
    from vlft.families.processor import Processor
    from vlft.packing.prefix_tree import PackedBatch
    from vlft.vision.cache import Images


@dataclass(frozen=True)
class LoopOptions:
    """See the flags of the same names; all defaults are resolved here."""

    total_steps: int
    batch_size: int
    tokens_per_row: int
    share_prefix: bool
    max_grad_norm: float
    save_steps: int
    eval_steps: int
    save_total_limit: int | None
    logging_steps: int
    early_stop: int | None


@dataclass(frozen=True)
class Job:
    """All that the loop works with.

    Attributes:
        accelerator: Accelerate's; device, mixed precision, gradient scaling, trackers.
        objective: a row and its pixels -> loss sum; prepared by the accelerator.
        optimizer: likewise.
        scheduler: likewise.
        model: the module whose parameters train, for the checkpoint's state.
        processor: of the checkpoint.
        images: where rows get their pictures from.
        train: training samples.
        val: validation samples; may be empty.
        schedule: their order.
        run: the run folder.
        write_weights: puts adapter or weights, and the run's settings, into a folder.
        options: see LoopOptions.
    """

    accelerator: Any
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    model: nn.Module
    processor: Processor
    images: Images
    train: Dataset
    val: Dataset
    schedule: Schedule
    run: Path
    write_weights: Callable[[Path], None]
    options: LoopOptions


class Interrupt:
    """The first Ctrl-C (or SIGTERM) asks for an end after the step, the second ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        """Takes the signals over; only a main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        console.info("stopping after this step; once more stops at once")


def train(job: Job, position: Position) -> Position:
    """Trains from a position to the end, or to an interrupt; returns where it stopped."""
    options = job.options
    window = Window(started=time.perf_counter())
    saved_at = position.step
    encoded = 0
    trackers = job.accelerator if job.accelerator.trackers else None
    with (
        Interrupt() as interrupt,
        RunLog(job.run, options.total_steps, position.step, trackers) as log,
    ):
        for step, indices in job.schedule.steps(position.step):
            if position.finished or step >= options.total_steps or interrupt.asked:
                break
            rows = pack(job, [job.train[index] for index in indices])
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


def pack(job: Job, samples: list[Any]) -> list[PackedBatch]:
    """The rows of some samples."""
    return pack_rows(
        samples,
        job.processor.chat.image_token_id,
        tokens_per_row=job.options.tokens_per_row,
        share=job.options.share_prefix,
    )


def take_step(job: Job, rows: list[PackedBatch]) -> tuple[float, float]:
    """One optimiser step over some rows; returns its loss sum in nats and its gradient norm."""
    job.objective.train()
    job.optimizer.zero_grad()
    weight = sum(float(row.weight.sum()) for row in rows)
    total = 0.0
    for row in rows:
        try:
            loss = row_loss(job, row)
            job.accelerator.backward(loss / weight)
        except torch.OutOfMemoryError as error:
            raise VlftError(
                f"out of memory with a row of {len(row)} tokens",
                place=str(job.accelerator.device),
                hint=(
                    f"lower --tokens-per-microbatch (now {job.options.tokens_per_row}), "
                    "or use --gradient-checkpointing or --quantize nf4"
                ),
            ) from error
        total += loss.item()
    if not math.isfinite(total):
        raise VlftError(
            f"the loss is {total}",
            place=str(job.run),
            hint="lower --learning-rate, or check the data; the last checkpoint is whole",
        )
    norm = clip(job)
    # With a gradient scaler such a step is skipped, and the scale lowered.
    if job.accelerator.scaler is None and not math.isfinite(norm):
        raise VlftError(
            f"the gradient norm is {norm}",
            place=str(job.run),
            hint="lower --learning-rate; the last checkpoint is whole",
        )
    job.optimizer.step()
    job.scheduler.step()
    return total, norm


def clip(job: Job) -> float:
    """Clips the gradients if asked to; returns their norm before."""
    limit = job.options.max_grad_norm or math.inf
    parameters = [p for p in job.model.parameters() if p.requires_grad]
    return float(job.accelerator.clip_grad_norm_(parameters, limit))


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
        for row in pack(job, samples):
            loss += row_loss(job, row).item()
            weight += float(row.weight.sum())
    return loss / weight


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


def save(job: Job, position: Position) -> Path:
    """Writes a checkpoint of this position, then the curves."""
    position.scheduler = dict(job.scheduler.state_dict())
    scaler = job.accelerator.scaler
    position.scaler = dict(scaler.state_dict()) if scaler is not None else {}

    def write(folder: Path) -> None:
        job.write_weights(folder)
        write_state(folder, position, job.optimizer, job.model)

    folder = save_checkpoint(
        job.run,
        position.step,
        write,
        keep=job.options.save_total_limit,
        best_step=position.best_step,
    )
    plot_run(job.run)
    return folder
