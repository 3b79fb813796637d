"""A LoRA job: transformers and peft as an experienced user writes it, against vlft.

A job is E epochs over the samples; an epoch is the forward and backward passes of one optimiser
step. Job seconds are those of encoding the images, where a side does that once, and of E epochs.
All sides have the same weights and the same samples. Decoding of files and the optimiser's own
arithmetic are the same on all sides and left out.

    python -m benchmarks training --models deepseek-vl2 --output benchmarks/results/deepseek-vl2-cpu
    python -m benchmarks training --scale tiny --repeats 1
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from benchmarks.command import DTYPES, new_parser, note, prepare, write
from benchmarks.comparison import GIB, Comparison, Meter, compare, table
from benchmarks.measure import apart, load_average
from benchmarks.models import random_model
from benchmarks.samples import random_samples
from benchmarks.shapes import SCALES
from benchmarks.sides import BatchSize, all_sides, plain_side
from benchmarks.workloads import SWEEPS, WORKLOADS, chosen_workloads
from vlft.config import TOKENS_PER_ROW

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    import torch

    from benchmarks.models import RandomModel
    from benchmarks.shapes import Shape
    from benchmarks.workloads import Workload


@dataclass(frozen=True)
class Settings:
    """See the options of the same names.

    Attributes:
        meter: how sides are measured.
        dtype: of frozen weights.
        scale: of the models.
        samples: of a job.
        plain_batch: sizes of padded batches to try.
        memory_limit: of the plain side, GiB.
        tokens_per_row: of vlft, at most.
    """

    meter: Meter
    dtype: torch.dtype
    scale: str
    samples: int
    plain_batch: list[int]
    memory_limit: float
    tokens_per_row: int


@dataclass(frozen=True)
class Try:
    """A run of the plain side with padded batches of a size.

    Attributes:
        size: of the batches.
        seconds: of an epoch.
        peak_gib: of memory.
    """

    size: BatchSize
    seconds: float
    peak_gib: float


def main(arguments: list[str]) -> None:
    """Measures, writes the files after every workload, prints the table."""
    options = parse_arguments(arguments)
    device, content = prepare(options)
    settings = Settings(
        meter=Meter(device, options.clock, options.repeats, options.epochs),
        dtype=DTYPES[options.dtype],
        scale=options.scale,
        samples=options.samples,
        plain_batch=options.plain_batch,
        memory_limit=options.memory_limit,
        tokens_per_row=options.tokens_per_row,
    )
    shapes = {name: SCALES[options.scale][name] for name in options.models}
    content["shapes"] = {name: asdict(shape) for name, shape in shapes.items()}
    content["plain_batches_tried"] = {}
    comparisons: list[Comparison] = []
    for name, shape in shapes.items():
        workloads = chosen_workloads(name, options.workloads)
        tries = try_batches(shape, workloads[0], settings)
        content["plain_batches_tried"][name] = [asdict(tried) for tried in tries]
        size = fastest(tries, settings.memory_limit)
        for compared in run_model(name, shape, workloads, size, settings):
            comparisons.append(compared)
            content["comparisons"] = [asdict(compared) for compared in comparisons]
            write(options.output, content, table(comparisons))
    print(table(comparisons))


def run_model(
    name: str, shape: Shape, workloads: list[Workload], size: BatchSize, settings: Settings
) -> Iterator[Comparison]:
    """All sides of a model, a workload at a time."""
    built: RandomModel | None = None
    for workload in workloads:
        if built is None or built.shape.image_size != workload.image_size:
            built = model_for(shape, workload, settings)
        job = random_samples(workload, built, settings.samples)
        sides = all_sides(built, job, size, settings.tokens_per_row)
        load = load_average()
        peaks = apart(peaks_of, name, settings, workload, size)
        results = compare(sides, built.tuned, job, settings.meter, peaks)
        note(f"{name}, {workload.name}: done")
        yield Comparison(name, workload.name, load, results)


def peaks_of(name: str, settings: Settings, workload: Workload, size: BatchSize) -> list[int]:
    """Bytes at the peak of each side."""
    found: list[int] = []
    # First a tiny model, for all that a process has only once.
    for shape in (SCALES["tiny"][name], SCALES[settings.scale][name]):
        built = model_for(shape, workload, settings)
        job = random_samples(workload, built, settings.samples)
        found = []
        for side in all_sides(built, job, size, settings.tokens_per_row):
            found.append(settings.meter.run(side).peak_bytes)
            built.tuned.zero_grad()
    return found


def model_for(shape: Shape, workload: Workload, settings: Settings) -> RandomModel:
    """The model with a tower for the workload's images."""
    sized = replace(shape, image_size=workload.image_size)
    return random_model(sized, settings.dtype, settings.meter.device)


def try_batches(shape: Shape, workload: Workload, settings: Settings) -> list[Try]:
    """The plain side at each size of its batches, after a warm-up."""
    built = model_for(shape, workload, settings)
    job = random_samples(workload, built, settings.samples)
    tries = []
    for samples in settings.plain_batch:
        size = BatchSize(samples, samples * max(map(len, job.samples)))
        side = plain_side(built, job, size, checkpointing=False)
        runs = []
        for _ in range(2):
            runs.append(settings.meter.run(side))
            built.tuned.zero_grad()
        tried = Try(size, runs[-1].epoch_seconds, max(run.peak_bytes for run in runs) / GIB)
        tries.append(tried)
        found = f"{tried.seconds:.2f} s, {tried.peak_gib:.2f} GiB"
        note(f"{shape.family}, plain, batches of {samples}: {found}")
    return tries


def fastest(tries: list[Try], limit_gib: float) -> BatchSize:
    """The size at which the plain side is fastest within a memory limit."""
    fitting = [tried for tried in tries if tried.peak_gib <= limit_gib]
    if not fitting:
        sys.exit(f"no --plain-batch fits into --memory-limit {limit_gib} GiB: {tries}")
    return min(fitting, key=lambda tried: tried.seconds).size


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The options, every default resolved."""
    parser = new_parser("training", __doc__, repeats=3)
    add = parser.add_argument
    names = [*WORKLOADS, *SWEEPS]
    models = list(SCALES["middle"])
    add("--models", nargs="+", default=models, choices=models, help="default: all")
    add(
        "--workloads",
        nargs="+",
        choices=names,
        help=f"default: all for deepseek-vl, q1 q5 mixed for the others; of {', '.join(names)}",
        metavar="NAME",
    )
    add("--scale", default="middle", choices=SCALES, help="of the models; tiny: a quick look")
    add("--dtype", choices=DTYPES, help="of frozen weights; default: bfloat16, if tiny float32")
    add("--samples", type=int, default=10, help="of an optimiser step; default: 10")
    add("--epochs", type=int, default=3, help="of a job; default: 3")
    add("--plain-batch", type=int, nargs="+", default=[1, 2, 5], help="the fastest is taken")
    add("--memory-limit", type=float, default=12, help="of the plain side, GiB; default: 12")
    add("--tokens-per-row", type=int, help="of vlft; default: vlft's own")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("float32" if options.scale == "tiny" else "bfloat16")
    options.tokens_per_row = options.tokens_per_row or TOKENS_PER_ROW[options.device]
    return options
