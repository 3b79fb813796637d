"""One optimiser step's gradient, the plain way against vlft's, in one process on one model.

The figures of docs/performance.md:

    python -m benchmarks.packing --output-json benchmarks/results/packing-cpu.json
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.measure import CLOCKS, Measured, load_average, machine, measure, write_json
from benchmarks.sides import Side, gradient, packed_side, plain_side
from benchmarks.workload import Shape, Workload, random_model, random_workload
from vlft.training.setup import TOKENS_PER_ROW

if TYPE_CHECKING:
    from torch import Tensor, nn

GIB = 2**30


@dataclass
class Result:
    """What was measured of a side."""

    questions: int
    images: int
    name: str
    forwards: int
    tokens: int
    seconds: float
    all_seconds: list[float]
    speedup: float
    peak_gib: float
    loss: float
    gradient_difference: float


def compare(
    sides: list[Side], tuned: nn.Module, repeats: int, device: torch.device, clock: str
) -> list[tuple[list[Measured], Tensor]]:
    """Runs and gradient of each side: one warm-up, then repeats in alternating order."""
    runs: list[list[Measured]] = [[] for _ in sides]
    gradients: list[Tensor] = []
    for side in sides:
        measure(side.step, device)
        gradients.append(gradient(tuned))
    for repeat in range(repeats):
        order = range(len(sides)) if repeat % 2 == 0 else reversed(range(len(sides)))
        for index in order:
            runs[index].append(measure(sides[index].step, device, clock))
            tuned.zero_grad()
    return list(zip(runs, gradients, strict=True))


def results_of(
    questions: int, work: Workload, sides: list[Side], found: list[tuple[list[Measured], Tensor]]
) -> list[Result]:
    """The lines of the table of one workload; the first side is the one compared with."""
    base_seconds = statistics.median(run.seconds for run in found[0][0])
    base_gradient = found[0][1]
    results = []
    for side, (runs, vector) in zip(sides, found, strict=True):
        seconds = statistics.median(run.seconds for run in runs)
        results.append(
            Result(
                questions=questions,
                images=len(work.pixels),
                name=side.name,
                forwards=side.forwards,
                tokens=side.tokens,
                seconds=seconds,
                all_seconds=[run.seconds for run in runs],
                speedup=base_seconds / seconds,
                peak_gib=max(run.peak_bytes for run in runs) / GIB,
                loss=runs[-1].value,
                gradient_difference=float((vector - base_gradient).norm() / base_gradient.norm()),
            )
        )
    return results


def fastest_batch(
    tuned: nn.Module,
    work: Workload,
    sizes: list[int],
    limit_gib: float,
    precision: Any,
    clock: str,
) -> tuple[int, list[dict[str, float]]]:
    """The batch size at which the plain side is fastest within a memory limit, and all tries."""
    device = next(iter(work.pixels.values())).device
    tries = []
    for size in sizes:
        side = plain_side(tuned, work, size, precision)
        runs = [measure(side.step, device, clock) for _ in range(2)]
        tuned.zero_grad()
        peak = max(run.peak_bytes for run in runs) / GIB
        tries.append({"size": size, "seconds": runs[-1].seconds, "peak_gib": peak})
        note(f"plain, batches of {size}: {runs[-1].seconds:.2f} s, {peak:.2f} GiB")
    fitting = [found for found in tries if found["peak_gib"] <= limit_gib]
    if not fitting:
        sys.exit(f"no --plain-batch of {sizes} fits into --memory-limit {limit_gib} GiB")
    return int(min(fitting, key=lambda found: found["seconds"])["size"]), tries


def note(text: str) -> None:
    """Progress, apart from the table."""
    print(text, file=sys.stderr, flush=True)


def table(results: list[Result]) -> str:
    """The results in Markdown."""
    lines = [
        "| questions per image | computation | forwards | LLM tokens | s / step | speed-up "
        "| peak memory, GiB | loss | gradient difference |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.questions} | {r.name} | {r.forwards} | {r.tokens} | {r.seconds:.2f} "
        f"| {r.speedup:.2f} | {r.peak_gib:.2f} | {r.loss:.5f} | {r.gradient_difference:.1e} |"
        for r in results
    ]
    return "\n".join(lines)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of frozen weights")
    add("--repeats", type=int, default=5)
    add("--questions", type=int, nargs="+", default=[1, 2, 5, 10], help="per image")
    add("--samples", type=int, default=10, help="per optimiser step")
    add("--plain-batch", type=int, nargs="+", default=[1, 2, 5], help="the fastest is taken")
    add("--memory-limit", type=float, default=12, help="of the plain side, GiB")
    add("--tokens-per-row", type=int, nargs="+", help="of vlft; sharing off with the first")
    add("--vocabulary", type=int, default=102400)
    add("--hidden", type=int, default=1024)
    add("--intermediate", type=int, default=2816)
    add("--layers", type=int, default=8)
    add("--heads", type=int, default=16)
    add("--vision-width", type=int, default=1024)
    add("--vision-layers", type=int, default=6)
    add("--threads", type=int, help="default: torch's own")
    add("--clock", default="wall", choices=sorted(CLOCKS))
    add("--output-json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table, writes the file."""
    options = parse_arguments(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = {field.name for field in dataclasses.fields(Shape)}
    shape = Shape(**{key: value for key, value in vars(options).items() if key in sizes})
    row_sizes = options.tokens_per_row or [TOKENS_PER_ROW[device.type]]
    load_before = load_average()
    model, tuned = random_model(shape, dtype, device)

    def precision() -> Any:
        # What Accelerate does for a model in bfloat16.
        return torch.autocast(device.type, dtype, enabled=dtype is torch.bfloat16)

    first = random_workload(shape, options.samples, options.questions[0], dtype, device)
    size, tries = fastest_batch(
        tuned, first, options.plain_batch, options.memory_limit, precision, options.clock
    )
    results: list[Result] = []
    for questions in options.questions:
        work = random_workload(shape, options.samples, questions, dtype, device)
        sides = [plain_side(tuned, work, size, precision)]
        sides += [packed_side(model, work, rows, True, precision) for rows in row_sizes]
        sides.append(packed_side(model, work, row_sizes[0], False, precision))
        found = compare(sides, tuned, options.repeats, device, options.clock)
        results += results_of(questions, work, sides, found)
        note(f"{questions} question(s) per image done")
    print(table(results))
    if options.output_json:
        settings = {key: value for key, value in vars(options).items() if key != "output_json"}
        content = {
            "machine": machine(device),
            "load_before": load_before,
            "settings": {**settings, "tokens_per_row": row_sizes},
            "plain_batches_tried": tries,
            "results": [dataclasses.asdict(result) for result in results],
        }
        write_json(options.output_json, content)


if __name__ == "__main__":
    main()
