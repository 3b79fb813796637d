"""Runs of several sides on the same samples, and the table of what they took."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.command import markdown
from benchmarks.measure import measure
from benchmarks.sides import gradient

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor, nn

    from benchmarks.samples import Samples
    from benchmarks.sides import Side

GIB = 2**30


@dataclass(frozen=True)
class Meter:
    """How sides are measured.

    Attributes:
        device: whose memory counts.
        clock: wall or cpu.
        repeats: after one warm-up.
        epochs: of a job.
    """

    device: torch.device
    clock: str
    repeats: int
    epochs: int

    def run(self, side: Side) -> Run:
        """Encodes the images, if the side does so, and runs one epoch."""
        once = measure(side.encode, self.device, self.clock) if side.encode else None
        epoch = measure(side.epoch, self.device, self.clock)
        seconds, peak = (once.seconds, once.peak_bytes) if once else (0.0, 0)
        return Run(seconds, epoch.seconds, max(peak, epoch.peak_bytes), epoch.value)


@dataclass(frozen=True)
class Run:
    """One run of a side.

    Attributes:
        encode_seconds: of the images, once a job.
        epoch_seconds: of an epoch.
        peak_bytes: of memory, beside what was held before.
        loss: nats per trained token.
    """

    encode_seconds: float
    epoch_seconds: float
    peak_bytes: int
    loss: float


@dataclass(frozen=True)
class Measured:
    """A side with its runs.

    Attributes:
        side: that was run.
        gradient: of the warm-up, one vector.
        peak_bytes: of memory.
        runs: in the order in which they were measured.
    """

    side: Side
    gradient: Tensor
    peak_bytes: int
    runs: list[Run] = field(default_factory=list)

    @property
    def encode_seconds(self) -> float:
        """Median of the runs."""
        return statistics.median(run.encode_seconds for run in self.runs)

    @property
    def epoch_seconds(self) -> float:
        """Median of the runs."""
        return statistics.median(run.epoch_seconds for run in self.runs)

    def job_seconds(self, epochs: int) -> float:
        """Of encoding and all epochs."""
        return self.encode_seconds + epochs * self.epoch_seconds


@dataclass(frozen=True)
class Result:
    """A row of the table; seconds are medians.

    Attributes:
        side: by name.
        forwards: passes through the LLM in an epoch.
        tokens: that the LLM sees in an epoch, padding included.
        encode_seconds: of the images, once a job.
        epoch_seconds: of an epoch.
        job_seconds: of encoding and all epochs.
        samples_per_second: over the job.
        targets_per_second: trained tokens, over the job.
        speedup: job seconds of the first side over this one's.
        peak_gib: of memory, beside the model's.
        peak_ratio: to the first side's.
        loss: nats per trained token.
        gradient_difference: its norm, over the norm of the first side's gradient.
        runs: in the order in which they were measured.
    """

    side: str
    forwards: int
    tokens: int
    encode_seconds: float
    epoch_seconds: float
    job_seconds: float
    samples_per_second: float
    targets_per_second: float
    speedup: float
    peak_gib: float
    peak_ratio: float
    loss: float
    gradient_difference: float
    runs: list[Run]


@dataclass(frozen=True)
class Comparison:
    """The sides on one workload.

    Attributes:
        model: by name.
        workload: by name.
        load_before: mean number of busy processes in the minute before.
        results: of each side; the first one is the one compared with.
    """

    model: str
    workload: str
    load_before: float
    results: list[Result]


def compare(
    sides: Sequence[Side],
    tuned: nn.Module,
    job: Samples,
    meter: Meter,
    peaks: Sequence[int],
) -> list[Result]:
    """The results of the sides.

    Args:
        sides: the first one is the one compared with.
        tuned: the model that holds the gradients.
        job: what the sides train on.
        meter: how they are measured.
        peaks: bytes of memory, of each side.
    """
    found = measure_sides(sides, tuned, meter, peaks)
    return [result_of(measured, found[0], job, meter.epochs) for measured in found]


def measure_sides(
    sides: Sequence[Side], tuned: nn.Module, meter: Meter, peaks: Sequence[int]
) -> list[Measured]:
    """Each side: a warm-up, whose gradient is kept, then repeats in alternating order."""
    found = []
    for side, peak in zip(sides, peaks, strict=True):
        meter.run(side)
        found.append(Measured(side, gradient(tuned), peak))
    for repeat in range(meter.repeats):
        for measured in found if repeat % 2 == 0 else reversed(found):
            measured.runs.append(meter.run(measured.side))
            tuned.zero_grad()
    return found


def result_of(found: Measured, base: Measured, job: Samples, epochs: int) -> Result:
    """The row of a side.

    Args:
        found: of the side.
        base: of the side that it is compared with.
        job: what both trained on.
        epochs: of the job.
    """
    seconds = found.job_seconds(epochs)
    difference = (found.gradient - base.gradient).norm() / base.gradient.norm()
    return Result(
        side=found.side.name,
        forwards=found.side.forwards,
        tokens=found.side.tokens,
        encode_seconds=found.encode_seconds,
        epoch_seconds=found.epoch_seconds,
        job_seconds=seconds,
        samples_per_second=epochs * len(job.samples) / seconds,
        targets_per_second=epochs * job.targets / seconds,
        speedup=base.job_seconds(epochs) / seconds,
        peak_gib=found.peak_bytes / GIB,
        peak_ratio=found.peak_bytes / base.peak_bytes,
        loss=found.runs[-1].loss,
        gradient_difference=float(difference),
        runs=found.runs,
    )


def table(comparisons: Sequence[Comparison]) -> str:
    """The results in Markdown."""
    columns = (
        "model", "workload", "side", "forwards", "LLM tokens", "encode, s", "epoch, s", "job, s",
        "samples/s", "trained tokens/s", "speed-up", "peak, GiB", "of plain's", "loss",
        "gradient difference",
    )  # fmt: skip
    rows = [
        [compared.model, compared.workload, *cells(result)]
        for compared in comparisons
        for result in compared.results
    ]
    return markdown(columns, rows, words=3)


def cells(result: Result) -> list[str]:
    """What the table says of a side."""
    return [
        result.side,
        str(result.forwards),
        str(result.tokens),
        f"{result.encode_seconds:.2f}",
        f"{result.epoch_seconds:.2f}",
        f"{result.job_seconds:.2f}",
        f"{result.samples_per_second:.3g}",
        f"{result.targets_per_second:.3g}",
        f"{result.speedup:.2f}",
        f"{result.peak_gib:.2f}",
        f"{result.peak_ratio:.2f}",
        f"{result.loss:.5f}",
        f"{result.gradient_difference:.1e}",
    ]
