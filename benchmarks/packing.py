"""One optimiser step's gradient, the plain way against vlft's, in one process on one model.

plain   padded batches, an image encoded once per sample, logits at every position
vlft    rows of PackedLoss, an image encoded once per row, logits only at targets

    python -m benchmarks.packing --output-json benchmarks/results/packing-cpu.json
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.measure import Measured, load_average, machine, measure, write_json
from benchmarks.workload import Shape, Workload, random_model, random_workload
from vlft.data.encode import IGNORE
from vlft.families.deepseek_vl import FAMILY
from vlft.packing.schedule import pack_rows
from vlft.training.loss import PackedLoss
from vlft.training.run import TOKENS_PER_ROW

GIB = 2**30


@dataclass(frozen=True)
class Side:
    """One way to compute the gradient of a step.

    Attributes:
        name: in the table.
        forwards: passes through the model.
        tokens: tokens that the LLM sees.
        step: leaves the gradient in the model, returns the loss in nats per trained token.
    """

    name: str
    forwards: int
    tokens: int
    step: Callable[[], float]


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


def plain_loss(tuned: nn.Module, work: Workload, first: int, size: int) -> Tensor:
    """Sum of the losses of a padded batch, in nats: the usual way, with peft's model."""
    samples = work.samples[first : first + size]
    ids = pad_sequence([sample.input_ids for sample in samples], batch_first=True)
    labels = pad_sequence([s.labels for s in samples], batch_first=True, padding_value=IGNORE)
    mask = pad_sequence([torch.ones_like(s.input_ids) for s in samples], batch_first=True)
    pixels = torch.stack([work.pixels[sample.images[0].key] for sample in samples])
    logits = tuned(
        input_ids=ids.to(pixels.device),
        attention_mask=mask.to(pixels.device),
        pixel_values=pixels,
        use_cache=False,
    ).logits
    # As transformers shifts: the labels move, so that the logits need not be copied.
    labels = F.pad(labels, (0, 1), value=IGNORE)[:, 1:].to(pixels.device)
    return F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )


def plain_side(tuned: nn.Module, work: Workload, size: int, precision: Any) -> Side:
    """The plain computation over padded batches of ``size`` samples."""
    starts = range(0, len(work.samples), size)

    def step() -> float:
        total = 0.0
        for first in starts:
            with precision():
                loss = plain_loss(tuned, work, first, size) / work.targets
            loss.backward()
            total += loss.item()
        return total

    tokens = sum(len(sample) for sample in work.samples)
    return Side(f"plain, batches of {size}", len(starts), tokens, step)


def packed_side(
    model: nn.Module, work: Workload, tokens_per_row: int, share: bool, precision: Any
) -> Side:
    """vlft's computation, as training.loop.take_step does it."""
    objective = PackedLoss(model, FAMILY)

    def rows() -> list[Any]:
        return pack_rows(
            work.samples, work.image_token_id, tokens_per_row=tokens_per_row, share=share
        )

    def step() -> float:
        total = 0.0
        for row in rows():
            pixels = torch.stack([work.pixels[image.key] for image in row.images])
            with precision():
                loss = objective(row.to(pixels.device), pixels) / work.targets
            loss.backward()
            total += loss.item()
        return total

    name = "vlft" if share else "vlft, sharing off"
    made = rows()
    return Side(f"{name}, rows of {tokens_per_row}", len(made), sum(len(row) for row in made), step)


def gradient(tuned: nn.Module) -> Tensor:
    """All LoRA gradients as one vector; they are cleared."""
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    vector = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
    tuned.zero_grad()
    return vector


def compare(
    sides: list[Side], tuned: nn.Module, repeats: int, device: torch.device
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
            runs[index].append(measure(sides[index].step, device))
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
    tuned: nn.Module, work: Workload, sizes: list[int], limit_gib: float, precision: Any
) -> tuple[int, list[dict[str, float]]]:
    """The batch size at which the plain side is fastest within a memory limit, and all tries."""
    device = next(iter(work.pixels.values())).device
    tries = []
    for size in sizes:
        side = plain_side(tuned, work, size, precision)
        runs = [measure(side.step, device) for _ in range(2)]
        tuned.zero_grad()
        peak = max(run.peak_bytes for run in runs) / GIB
        tries.append({"size": size, "seconds": runs[-1].seconds, "peak_gib": peak})
        print(f"plain, batches of {size}: {runs[-1].seconds:.2f} s, {peak:.2f} GiB", flush=True)
    fitting = [found for found in tries if found["peak_gib"] <= limit_gib]
    if not fitting:
        sys.exit(f"no --plain-batch of {sizes} fits into --memory-limit {limit_gib} GiB")
    return int(min(fitting, key=lambda found: found["seconds"])["size"]), tries


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
    add("--tokens-per-row", type=int, nargs="+", help="of vlft; default: vlft's own")
    add("--vocabulary", type=int, default=102400)
    add("--hidden", type=int, default=1024)
    add("--intermediate", type=int, default=2816)
    add("--layers", type=int, default=8)
    add("--heads", type=int, default=16)
    add("--vision-width", type=int, default=1024)
    add("--vision-layers", type=int, default=6)
    add("--output-json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table, writes the file."""
    options = parse_arguments(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    sizes = {field.name for field in dataclasses.fields(Shape)}
    shape = Shape(**{key: value for key, value in vars(options).items() if key in sizes})
    row_sizes = options.tokens_per_row or [TOKENS_PER_ROW[device.type]]
    load_before = load_average()
    model, tuned = random_model(shape, dtype, device)

    def precision() -> Any:
        # What Accelerate does for a model in bfloat16.
        return torch.autocast(device.type, dtype, enabled=dtype is torch.bfloat16)

    first = random_workload(shape, options.samples, options.questions[0], dtype, device)
    size, tries = fastest_batch(tuned, first, options.plain_batch, options.memory_limit, precision)
    results: list[Result] = []
    for questions in options.questions:
        work = random_workload(shape, options.samples, questions, dtype, device)
        sides = [plain_side(tuned, work, size, precision)]
        for share in (True, False):
            sides += [packed_side(model, work, rows, share, precision) for rows in row_sizes]
        found = compare(sides, tuned, options.repeats, device)
        results += results_of(questions, work, sides, found)
        print(f"{questions} question(s) per image done", flush=True)
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
