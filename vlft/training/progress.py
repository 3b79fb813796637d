"""The progress of a run: live line, log lines, metrics.jsonl, closing lines."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress

from vlft import console
from vlft.evaluation.kept_answers import write_answers
from vlft.training.plots import METRICS
from vlft.training.rows import Losses

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from vlft.evaluation.judge import Verdict
    from vlft.packing.packer import RowPlan
    from vlft.training.position import Position


@dataclass
class Window:
    """Sums over the steps since the last log line. It is saved with a checkpoint and resumed.

    Attributes:
        loss_sum: weighted cross-entropy, in nats.
        weight: targets: supervised tokens, and codes of drawn images.
        code_loss_sum: the part of ``loss_sum`` that is of codes.
        code_weight: how many of the targets are codes.
        packed: tokens in the rows.
        unshared: tokens of the samples, before sharing.
        images_encoded: images that went through the vision tower.
        seconds: of these steps, evaluations and checkpoints left out.
        learning_rate: of the last step.
        grad_norm: of the last step, before clipping.
    """

    loss_sum: float = 0.0
    weight: float = 0.0
    code_loss_sum: float = 0.0
    code_weight: float = 0.0
    packed: int = 0
    unshared: int = 0
    steps: int = 0
    images_encoded: int = 0
    seconds: float = 0.0
    learning_rate: float = 0.0
    grad_norm: float = 0.0

    def __post_init__(self) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def pause(self) -> None:
        """Stops the clock, while something else than steps takes place."""
        self.seconds += time.perf_counter() - self._started

    def resume(self) -> None:
        """Starts the clock again."""
        self._started = time.perf_counter()

    def add(self, losses: Losses, rows: Sequence[RowPlan], images_encoded: int) -> None:
        """Counts one optimiser step."""
        self.loss_sum += losses.total
        self.code_loss_sum += losses.codes
        self.weight += sum(row.targets for row in rows)
        self.code_weight += sum(row.codes for row in rows)
        self.packed += sum(row.tokens for row in rows)
        self.unshared += sum(row.sample_tokens for row in rows)
        self.images_encoded += images_encoded
        self.steps += 1

    def metrics(self) -> dict[str, float]:
        """Mean loss and rates of the window; the clock must be stopped."""
        seconds = max(self.seconds, 1e-9)
        return {
            "loss": self.loss_sum / max(self.weight, 1.0),
            **parts_of(Losses(self.loss_sum, self.code_loss_sum), self.weight, self.code_weight),
            "supervised_tokens_per_second": self.weight / seconds,
            "packed_tokens_per_second": self.packed / seconds,
            "tokens_saved": 1 - self.packed / max(self.unshared, 1),
            "seconds_per_step": seconds / max(self.steps, 1),
            "memory_gib": _peak_memory() / 2**30,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "images_encoded": self.images_encoded,
        }


def parts_of(losses: Losses, targets: float, codes: float) -> dict[str, float]:
    """Mean losses of text and of codes apart, by name; empty if there are no codes.

    Args:
        losses: sums over the targets.
        targets: number of all targets.
        codes: how many of them are codes.
    """
    if not codes:
        return {}
    parts = {"code_loss": losses.codes / codes}
    if targets > codes:
        parts["text_loss"] = (losses.total - losses.codes) / (targets - codes)
    return parts


class RunLog:
    """Writes metrics.jsonl and shows the progress of a run. A context manager.

    Args:
        run: the run folder.
        total_steps: of the whole run.
        first_step: steps done before, by the run that is resumed.
        trackers: the Accelerator whose trackers get the metrics too, or None.
        writes: whether this rank writes and shows; only rank zero does.
    """

    def __init__(
        self, run: Path, total_steps: int, first_step: int, trackers: Any, *, writes: bool = True
    ) -> None:
        self._writes = writes
        self._path = run / METRICS
        self._total = total_steps
        self._trackers = trackers
        self._started = time.perf_counter()
        self._first = first_step
        self._live = Progress(
            "step",
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            # rich's own column shows no time left if the last 30 s have no step.
            "{task.fields[loss]} {task.fields[left]}",
            console=console.err,
            transient=True,
            disable=not (console.err.is_terminal and writes),
        )
        self._task = self._live.add_task(
            "", total=total_steps, completed=first_step, loss="", left=""
        )

    def __enter__(self) -> RunLog:
        """Starts the live line."""
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Removes the live line; the log lines stay."""
        # Where it is disabled, rich would print an empty line.
        if not self._live.disable:
            self._live.stop()

    def advance(self, step: int) -> None:
        """Moves the live line to a step."""
        self._live.update(self._task, completed=step, left=self._time_left(step))

    def step(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """Records and shows the metrics of a window that ends with this step."""
        self._write({"step": step, "epoch": round(epoch, 4), **metrics})
        loss = f"loss {metrics['loss']:.4f}"
        parts = [
            f"step {step}/{self._total}",
            loss,
            f"lr {metrics['learning_rate']:.2e}",
            f"{metrics['packed_tokens_per_second']:,.0f} tok/s",
            f"saved {metrics['tokens_saved']:.0%}",
            f"{metrics['memory_gib']:.2f} GiB",
        ]
        if self._live.disable:
            parts.insert(3, f"{metrics['supervised_tokens_per_second']:,.0f} trained tok/s")
            parts.append(self._time_left(step))
        self._live.update(self._task, loss=loss)
        self.advance(step)
        console.info("  ".join(parts))

    def evaluation(
        self,
        step: int,
        loss: float,
        parts: Mapping[str, float],
        verdict: Verdict | None = None,
        *,
        is_best: bool,
    ) -> None:
        """Records and shows a validation loss, its parts, and the score of answers."""
        row = {"step": step, "val_loss": loss, **{f"val_{k}": v for k, v in parts.items()}}
        if verdict is not None:
            row |= {"val_score": verdict.score, "val_best": int(is_best)}
        self._write(row)
        of = "".join(f", {k.removesuffix('_loss')} {v:.4f}" for k, v in sorted(parts.items()))
        best = " (best)" if is_best else ""
        score = "" if verdict is None else f", {verdict.metric} {verdict.score:.4f}"
        console.info(f"step {step}: validation loss {loss:.4f}{of}{score}{best}")

    def answers(self, rows: Sequence[Mapping[str, Any]], position: Position) -> None:
        """Keeps the answers of an evaluation, besides those of the base and of the best."""
        if self._writes:
            write_answers(self._path.parent, position.step, rows, {0, position.best_step or 0})

    def _time_left(self, step: int) -> str:
        done = max(step - self._first, 1)
        seconds = (time.perf_counter() - self._started) / done * (self._total - step)
        return f"{_clock(seconds)} left"

    def _write(self, row: dict[str, float]) -> None:
        if not self._writes:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._trackers is not None:
            values = dict(row)
            self._trackers.log(values, step=int(values.pop("step")))


def closing_lines(
    run: Path, position: Position, seconds: float, *, draws: bool = False, metric: str = ""
) -> list[str]:
    """The last lines of a run: time taken, best and last checkpoint, the command to type next.

    ``draws`` if all replies are images; ``metric`` is the name of --eval-metric.
    """
    last = run / f"checkpoint-{position.step}"
    if position.step == 0:
        return [f"stopped after {_clock(seconds)}, before the first step: nothing to go on from"]
    if not position.finished:
        return [
            f"stopped after {_clock(seconds)}, saved as {last}",
            f"go on with: vlft sft --resume {shlex.quote(str(run))}",
        ]
    is_evaluated = position.evaluated_step == position.step
    last_found = (position.last_loss, position.last_score) if is_evaluated else (None, None)
    best_found = (position.best_loss, position.best_score)
    best = run / f"checkpoint-{position.best_step}" if position.best_step else last
    shown = [("best", best, best_found), ("last", last, last_found)]
    if best == last:
        shown = [("best and last", best, best_found)] if position.best_step else shown[1:]
    lines = [f"done: {position.step} steps in {_clock(seconds)}"]
    for name, checkpoint, (loss, score) in shown:
        evaluated = "" if loss is None else f", validation loss {loss:.4f}"
        evaluated += "" if score is None else f", {metric} {score:.4f}"
        lines.append(f"{name}: {checkpoint.name}{evaluated}")
    command, asked = ("draw", " --prompt 'what to draw'") if draws else ("infer", "")
    if position.best_loss is not None:
        asked = " --load-dataset-config"
    return [*lines, f"next: vlft {command} --ckpt-dir {shlex.quote(str(best))}{asked}"]


def _peak_memory() -> int:
    """Peak memory in bytes: allocated on the GPU if there is one, else of this process.

    0 where the system does not tell it.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
