"""A LoRA job: the best loop that an expert writes over transformers and peft, against vlft.

A job is E epochs over the samples; an epoch is the forward and backward passes of one optimiser
step. Job seconds are those of encoding the images, where a side does that once, and of E epochs.
All sides have the same weights and the same samples. Decoding of files and the optimiser's own
arithmetic are the same on all sides and left out.

    python -m benchmarks training --models deepseek-vl2 --output benchmarks/results/deepseek-vl2-cpu
    python -m benchmarks training --scale tiny --repeats 1
"""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.command import changed, markdown, new_parser, note, prepare, write
from benchmarks.measure import GIB, Measured, apart, measure
from benchmarks.models import native_config
from benchmarks.sides import (
    add_job_options,
    cases_of,
    clear_gradient,
    make_sides,
)

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

    from benchmarks.sides import OtherSide, Side

COLUMNS = {
    "model": "{model}", "workload": "{workload}", "side": "{side}", "forwards": "{forwards}",
    "LLM tokens": "{tokens}", "encode, s": "{encode_seconds:.2f}",
    "epoch, s": "{epoch_seconds:.2f}", "job, s": "{job_seconds:.2f}",
    "speed-up, one epoch": "{once_speedup:.2f}", "speed-up": "{speedup:.2f}",
    "peak, GiB": "{peak_gib:.2f}", "of strong's": "{peak_ratio:.2f}",
    "with the model's": "{whole_ratio:.2f}",
    "loss": "{loss:.5f}", "gradient difference": "{gradient_difference:.1e}",
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measures, writes the files after every workload, prints the table."""
    parser = new_parser("training", __doc__, repeats=3)
    add_job_options(parser, workloads=None, dtype=None)
    add = parser.add_argument
    add("--epochs", type=int, default=3, help="of a job; default: 3")
    shown = "samples of the strong loop's padded batch; vlft is compared with the fastest"
    add("--batch", type=int, nargs="+", default=[1, 2], help=f"{shown}; default: 1 2")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("float32" if options.scale == "tiny" else "bfloat16")
    _, content = prepare(options)
    content["shapes"] = {name: native_config(name, options.scale) for name in options.models}
    content["comparisons"] = []
    table = ""
    for model in options.models:
        for case in cases_of(options, model):
            content["comparisons"].append(compare(case))
            note(f"{model}, {case.workload}: done")
            rows = [{**one, **r} for one in content["comparisons"] for r in one["results"]]
            table = markdown(COLUMNS, rows)
            write(options.output, content, table)
    print(table)


def compare(case: argparse.Namespace, other: OtherSide | None = None) -> dict[str, Any]:
    """All sides of a model on a workload: a warm-up, then repeats in alternating order."""
    peaks = apart(peaks_of, case, other)
    _, sides = make_sides(case, case.batch, other)
    gradients = [run(side, case)[1] for side in sides]
    order = [(side, list[dict[str, float]]()) for side in sides]
    for repeat in range(case.repeats):
        for side, runs in order if repeat % 2 == 0 else reversed(order):
            runs.append(run(side, case, trim=False)[0])
    results: list[dict[str, Any]] = []
    for (side, runs), peak, gradient in zip(order, peaks, gradients, strict=True):
        encode = statistics.median(found["encode_seconds"] for found in runs)
        epoch = statistics.median(found["epoch_seconds"] for found in runs)
        difference = (gradient - gradients[0]).norm() / gradients[0].norm()
        result = {
            "side": side.name, "forwards": side.forwards, "tokens": side.tokens,
            "encode_seconds": encode, "epoch_seconds": epoch,
            "job_seconds": encode + case.epochs * epoch,
            "peak_gib": peak / GIB, "loss": runs[-1]["loss"], "runs": runs,
            "gradient_difference": difference.item(),
        }  # fmt: skip
        results.append(result)
    # All sides are compared with the faster of the strong loops.
    strong = min(results[: len(case.batch)], key=lambda result: result["job_seconds"])
    weights = sum(p.nbytes for p in sides[0].built.model.parameters()) / GIB
    for result in results:
        once, base = (r["encode_seconds"] + r["epoch_seconds"] for r in (result, strong))
        # The speed of a side with another loss means nothing, so it is shown as nan.
        valid = 1.0 if math.isclose(result["loss"], strong["loss"], rel_tol=1e-3) else math.nan
        result["once_speedup"] = valid * base / once
        result["speedup"] = valid * strong["job_seconds"] / result["job_seconds"]
        result["peak_ratio"] = result["peak_gib"] / strong["peak_gib"]
        result["whole_ratio"] = (weights + result["peak_gib"]) / (weights + strong["peak_gib"])
    return {"model": case.model, "workload": case.workload, "results": results}


def run(
    side: Side, case: argparse.Namespace, *, trim: bool = True
) -> tuple[dict[str, float], Tensor]:
    """Encodes the images, if the side does so once, and runs an epoch; returns its gradient too."""
    clock = partial(measure, device=torch.device(case.device), clock=case.clock, trim=trim)
    encode = clock(side.encode) if side.encode else Measured(0.0, 0, 0.0)
    epoch = clock(side.epoch)
    found = {
        "encode_seconds": encode.seconds,
        "epoch_seconds": epoch.seconds,
        "loss": epoch.value,
    }
    if trim:
        found["peak_bytes"] = max(encode.peak_bytes, epoch.peak_bytes)
    return found, clear_gradient(side)


def peaks_of(case: argparse.Namespace, other: OtherSide | None) -> list[float]:
    """Bytes at the peak of each side; runs in a process of its own."""
    # First a tiny model, for what a process allocates only once.
    for scale in ("tiny", case.scale):
        _, sides = make_sides(changed(case, scale=scale), case.batch, other)
        found = [run(side, case)[0]["peak_bytes"] for side in sides]
    return found
