"""The training loop: rows in, steps out, with evaluation, checkpoints and a clean stop.

The loss of a step is the sum of its targets' cross-entropies over the sum of their weights, over
all rows and ranks. How samples are packed into rows and rows divided among ranks therefore changes
memory and time, not the result; only dropout masks, which are drawn row by row, depend on it.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from vlft import console
from vlft.errors import VlftError
from vlft.training.interrupt import Interrupt
from vlft.training.progress import RunLog, Window, parts_of
from vlft.training.rows import Losses, explaining_row, own_plans, own_rows, row_loss, row_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vlft.data.dataset import Dataset
    from vlft.data.encode import EncodedImage
    from vlft.errors import DataError
    from vlft.packing.packer import RowPlan
    from vlft.training.checkpointer import Checkpointer
    from vlft.training.job import Job, LoopOptions
    from vlft.training.position import Position


def train(
    job: Job, position: Position, checkpointer: Checkpointer, log: RunLog
) -> tuple[Position, DataError | None]:
    """Trains from a position to the end, or to an interrupt.

    Returns:
        Where it stopped, saved, and why if an image could not be read any more.
    """
    with Interrupt() as interrupt, log:
        loop = _Loop(job, position, checkpointer, log, interrupt)
        return loop.run(), loop.problem


@dataclass
class _Loop:
    """The loop with what it works on; see ``train``."""

    job: Job
    position: Position
    checkpointer: Checkpointer
    log: RunLog
    interrupt: Interrupt
    problem: DataError | None = None

    def run(self) -> Position:
        job, position = self.job, self.position
        saved_at = position.step
        window = Window(**position.window)
        # What the vision cache took; images of an evaluation are not counted.
        window.images_encoded += job.images.encoded
        # A new run measures the untrained model first; a resumed one makes up for an evaluation
        # that was interrupted.
        if self._due().evaluate and position.evaluated_step != position.step and self._evaluate():
            self.checkpointer.mark_best(position.step)
        window.resume()
        with closing(job.ahead.steps(job, position.step)) as steps:
            for plans in steps:
                if position.finished or self._stops_before(job.train, plans):
                    break
                self._step(plans, window)
                now = self._due()
                position.finished = now.finish
                self.log.advance(position.step)
                window.pause()
                if now.log:
                    window = self._log(window)
                is_best = now.evaluate and self._evaluate()
                if position.finished and window.steps:
                    # Early stopping ends a run between two log lines.
                    window = self._log(window)
                if now.save or is_best or position.finished:
                    self._save(window)
                    saved_at = position.step
                window.resume()
        if position.step > saved_at:
            window.pause()
            self._save(window)
        return position

    def _step(self, plans: Sequence[RowPlan], window: Window) -> None:
        encoded = self.job.images.encoded
        window.learning_rate = self.job.backend.scheduler.get_last_lr()[0]
        losses, window.grad_norm = take_step(self.job, plans)
        window.add(losses, plans, self.job.images.encoded - encoded)
        self.position.step += 1

    def _due(self) -> Due:
        return due(self.position.step, self.job.options, validates=len(self.job.val) > 0)

    def _stops_before(self, data: Dataset, plans: Sequence[RowPlan]) -> bool:
        """Whether any rank was asked to stop, or cannot read an image of its next rows."""
        members = (data.outlines[i] for plan in own_plans(self.job, plans) for i in plan.members)
        return self._stops_for(image for outline in members for image in outline.images)

    def _stops_for(self, images: Iterable[EncodedImage]) -> bool:
        """Whether any rank was asked to stop, or cannot read one of its images.

        All ranks stop at the same place.
        """
        self.problem = self.problem or self.job.images.problem_with(images)
        stops = self.interrupt.asked or self.problem is not None
        return self.job.backend.world.all_reduce(float(stops))[0] > 0

    def _log(self, window: Window) -> Window:
        """Logs a window; returns a new one."""
        epoch = self.position.step / self.job.planner.schedule.steps_per_epoch
        self.log.step(self.position.step, epoch, window.metrics())
        return Window()

    def _save(self, window: Window) -> None:
        self.position.window = asdict(window)
        self.checkpointer.save(self.position)

    def _evaluate(self) -> bool:
        """Evaluates and notes the result in the position; returns whether it is the best so far.

        A stop meanwhile abandons the evaluation; the resumed run makes up for it.
        """
        position = self.position
        found = evaluate(self.job, self._stops_before)
        if found is None:
            return False
        loss = found.loss
        if position.step == 0 and not math.isfinite(loss):
            raise _no_number(f"the validation loss is {loss}", self.job)
        judge, verdict = self.job.judge, None
        if judge is not None and (verdict := judge.ask(self._stops_for)) is None:
            return False
        is_best = position.note(loss, verdict)
        self.log.evaluation(position.step, loss, found.parts, verdict, is_best=is_best)
        if verdict is not None:
            self.log.answers(verdict.rows, position)
        patience = self.job.options.early_stop
        if patience is not None and position.evaluations_without_best >= patience:
            what = "loss" if verdict is None else verdict.metric
            console.info(f"no better {what} in {patience} evaluations; stopping early")
            position.finished = True
        return is_best


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


def take_step(job: Job, plans: Sequence[RowPlan]) -> tuple[Losses, float]:
    """One optimiser step.

    Args:
        job: see Job.
        plans: the rows of the step, those of all ranks.

    Returns:
        The loss sums of the step, and the norm of its gradients before clipping.

    Raises:
        VlftError: loss or gradients are not finite.
    """
    job.backend.zero_grad()
    losses = Losses(*job.backend.world.all_reduce(*take_gradients(job, plans)))
    if not math.isfinite(losses.total):
        raise _no_number(f"the loss is {losses.total}", job)
    # The first step allocates the moments of AdamW.
    with explaining_row(job, max(plan.tokens for plan in plans)):
        norm = job.backend.step()
    if not math.isfinite(norm) and not job.backend.scales_gradients:
        raise _no_number(f"the gradient norm is {norm}", job)
    return losses, norm


def _no_number(found: str, job: Job) -> VlftError:
    """The error of a loss or gradient that is no number, which before any step is the base's."""
    if job.backend.scheduler.state_dict()["last_epoch"] == 0:
        hint = (
            "use --dtype float32 if it is float16; its weights may be damaged, compare them with "
            "the original and look at its answers (vlft infer)"
        )
        place = f"the base model {job.base}".strip()
        return VlftError(f"{found} before any step", place=place, hint=hint)
    return VlftError(found, place="training", hint="lower --learning-rate, or check the data")


def take_gradients(job: Job, plans: Sequence[RowPlan]) -> Losses:
    """Adds the gradients of a step; returns the loss sums of this rank's rows.

    Args:
        job: see Job.
        plans: the rows of the step, those of all ranks.
    """
    backend = job.backend
    backend.objective.train()
    # Ranks average their gradients, but the step needs their sum.
    scale = backend.world.size / sum(plan.targets for plan in plans)
    sums = []
    rows = job.ahead.rows(job, plans)
    for number, row in enumerate(rows, start=1):
        last = number == len(rows)
        with backend.accumulate(last=last), explaining_row(job, len(row)):
            loss = row_loss(job, row)
            backend.backward(loss * scale, last=last)
        sums.append(row_losses(job, loss))
    # All at once: after each row the host would wait for the GPU, and then the GPU for the host.
    found = torch.stack(sums).tolist()
    return Losses(sum(total for total, _ in found), sum(codes for _, codes in found))


@dataclass(frozen=True)
class Evaluation:
    """The loss of a validation set, in nats per target.

    Attributes:
        loss: of all targets.
        parts: of text and of codes of drawn images apart; empty if none are drawn.
    """

    loss: float
    parts: dict[str, float]


@torch.no_grad()
def evaluate(
    job: Job, stops_before: Callable[[Dataset, Sequence[RowPlan]], bool]
) -> Evaluation | None:
    """Loss of the validation set.

    Args:
        job: see Job.
        stops_before: called on all ranks before the rows of each batch; see the return value.

    Returns:
        None if it stopped before the end.
    """
    job.backend.objective.eval()
    loss, of_codes, targets, codes = 0.0, 0.0, 0, 0
    size = job.options.batch_size
    for start in range(0, len(job.val), size):
        batch = job.val[start : start + size]
        plans = job.planner.packer.plan(batch.outlines)
        if stops_before(batch, plans):
            return None
        for row in own_rows(job, batch, plans):
            with explaining_row(job, len(row)):
                found = row_losses(job, row_loss(job, row)).tolist()
            loss, of_codes = loss + found[0], of_codes + found[1]
        targets += sum(plan.targets for plan in plans)
        codes += sum(plan.codes for plan in plans)
    losses = Losses(*job.backend.world.all_reduce(loss, of_codes))
    return Evaluation(losses.total / targets, parts_of(losses, targets, codes))
