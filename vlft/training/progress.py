"""What a run shows: a live line at a terminal, plain lines elsewhere, and metrics.jsonl always."""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlft import console

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from vlft.packing.packer import RowPlan


@dataclass
class Window:
    """What happened since the last log line.

    Attributes:
        loss_sum: weighted, in nats.
        weight: supervised tokens.
        packed: tokens run.
        unshared: tokens that the samples have in all.
        steps: optimiser steps.
        started: clock at the start, in seconds.
    """

    loss_sum: float = 0.0
    weight: float = 0.0
    packed: int = 0
    unshared: int = 0
    steps: int = 0
    started: float = 0.0

    def add(self, loss_sum: float, rows: Sequence[RowPlan]) -> None:
        """Counts one step."""
        self.loss_sum += loss_sum
        self.weight += sum(row.targets for row in rows)
        self.packed += sum(row.tokens for row in rows)
        self.unshared += sum(row.sample_tokens for row in rows)
        self.steps += 1

    def metrics(self) -> dict[str, float]:
        """Means and rates of the window."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return {
            "loss": self.loss_sum / max(self.weight, 1.0),
            "supervised_tokens_per_second": self.weight / seconds,
            "packed_tokens_per_second": self.packed / seconds,
            "tokens_saved": 1 - self.packed / max(self.unshared, 1),
            "seconds_per_step": seconds / max(self.steps, 1),
            "memory_gib": peak_memory() / 2**30,
        }


class RunLog:
    """Writes metrics.jsonl and shows how the run goes. Use it as a context.

    Args:
        run: the run folder.
        total_steps: of the whole run.
        first_step: steps already done.
        trackers: Accelerate's, to log to as well.
        writes: whether this process writes; of several only the first does.
    """

    def __init__(
        self, run: Path, total_steps: int, first_step: int, trackers: Any, *, writes: bool = True
    ) -> None:
        self._writes = writes
        self._path = run / "metrics.jsonl"
        self._total = total_steps
        self._trackers = trackers
        self._started = time.perf_counter()
        self._first = first_step
        self._live: Progress | None = None
        if console.err.is_terminal and writes:
            self._live = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=console.err,
            )
            self._task = self._live.add_task("", total=total_steps, completed=first_step, text="")

    def __enter__(self) -> RunLog:
        """Starts the live line."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the terminal as it was."""
        if self._live is not None:
            self._live.stop()

    def step(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """Records the metrics of a window that ends with this step."""
        self._write({"step": step, "epoch": round(epoch, 4), **metrics})
        text = (
            f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  "
            f"{metrics['supervised_tokens_per_second']:,.0f} trained tok/s  "
            f"{metrics['packed_tokens_per_second']:,.0f} tok/s  "
            f"saved {metrics['tokens_saved']:.0%}  {metrics['memory_gib']:.2f} GiB"
        )
        if self._live is not None:
            self._live.update(self._task, completed=step, text=text)
        else:
            done = max(step - self._first, 1)
            left = (time.perf_counter() - self._started) / done * (self._total - step)
            console.info(f"step {step}/{self._total}  {text}  {_clock(left)} left")

    def evaluation(self, step: int, loss: float, *, is_best: bool) -> None:
        """Records a validation loss."""
        self._write({"step": step, "val_loss": loss})
        console.info(f"step {step}: validation loss {loss:.4f}{' (best)' if is_best else ''}")

    def note(self, text: str) -> None:
        """Shows a line without breaking the live one."""
        console.info(text)

    def _write(self, row: dict[str, float]) -> None:
        if not self._writes:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._trackers is not None:
            step = int(row["step"])
            values = {key: value for key, value in row.items() if key != "step"}
            self._trackers.log(values, step=step)


def peak_memory() -> int:
    """Bytes: the GPU's peak where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
