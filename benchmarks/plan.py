"""The peak memory that ``vlft plan`` predicts, against the measured peak of training.

Measured is all that a process holds beside its libraries, while images are encoded and in two steps
on rows of the workload: model, LoRA, optimiser, activations. Each model and workload runs in a
process of its own.

    python -m benchmarks plan --output benchmarks/results/plan-cpu
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.command import changed, markdown, new_parser, prepare, record
from benchmarks.job import encode_images, make_job, rows_of
from benchmarks.measure import GIB, apart, peak_bytes, reset_peak
from benchmarks.samples import RandomProcessor
from benchmarks.sides import add_job_options, cases_of, make_model, make_samples
from vlft.config import PlanConfig
from vlft.planning.estimate import encoding_of, memory_spec
from vlft.planning.memory import estimate_memory
from vlft.planning.sizes import model_sizes
from vlft.training.loop import take_step
from vlft.training.model import set_checkpointing

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from benchmarks.models import RandomModel
    from benchmarks.samples import Samples
    from vlft.data.encode import EncodedImage
    from vlft.families.base import Views
    from vlft.planning.memory import Memory
    from vlft.training.job import Job

COLUMNS = {
    "model": "{model}", "workload": "{workload}", "checkpointing": "{checkpointing}",
    "tokens of a row": "{tokens}",
    "encoding: planned, GiB": "{encoding_planned_gib:.2f}", "measured, GiB": "{encoding_gib:.2f}",
    "steps: planned, GiB": "{step_planned_gib:.2f}", "measured": "{step_gib:.2f}",
    "peak: planned / measured": "{ratio:.2f}",
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measures, writes the files, prints the table."""
    parser = new_parser("plan", __doc__, repeats=1)
    add_job_options(parser, workloads=["q1", "q5", "mixed"], dtype="float32")
    options = parser.parse_args(arguments)
    _, content = prepare(options)
    for model in options.models:
        for case in cases_of(options, model):
            for result in apart(run, case):
                record(options, content, COLUMNS, result)
    print(markdown(COLUMNS, content["results"]))


class Decoding(RandomProcessor):
    """Gives images as decoding does, in memory of their own."""

    def pixel_values(self, images: Sequence[EncodedImage], **_: bool) -> list[Views]:
        """See Processor."""
        return [tuple(view.clone() for view in self.views[image.key]) for image in images]


def run(case: argparse.Namespace) -> list[dict[str, Any]]:
    """Plans and measures a model on a workload, without and with gradient checkpointing."""
    # Loads all libraries, so that they count as held before.
    tiny = changed(case, scale="tiny")
    take_steps(prepared(tiny, make_samples(tiny)[1])[1])
    # A command reads images from files, so those that the samples hold must not count.
    samples = make_samples(case)[1]
    samples = replace(samples, processor=Decoding(**vars(samples.processor)))
    device = torch.device(case.device)
    gc.collect()
    before = reset_peak(device)
    built, job = prepared(case, samples)
    encoding = peak_bytes(device) - before
    results = []
    for on in (False, True):
        set_checkpointing(built.model, on=on)
        built.tuned.zero_grad()
        gc.collect()
        reset_peak(device)
        tokens = take_steps(job)
        measured = {"encoding": encoding, "step": peak_bytes(device) - before}
        memory = planned_memory(built, changed(case, checkpointing=on), samples, tokens)
        planned = {name: getattr(memory, name) - memory.runtime for name in measured}
        results.append({
            "model": case.model, "workload": case.workload, "tokens": tokens,
            "checkpointing": "yes" if on else "no",
            **{f"{name}_planned_gib": planned[name] / GIB for name in planned},
            **{f"{name}_gib": measured[name] / GIB for name in measured},
            **{f"{name}_ratio": planned[name] / measured[name] for name in measured},
            "ratio": max(planned.values()) / max(measured.values()),
            "parts_mib": {k: round(v / 2**20, 1) for k, v in vars(memory).items()},
        })  # fmt: skip
    return results


def prepared(case: argparse.Namespace, samples: Samples) -> tuple[RandomModel, Job]:
    """A new model and its job, whose images are encoded."""
    built = make_model(case)
    job = make_job(built, samples)
    encode_images(job, samples)
    return built, job


def take_steps(job: Job) -> int:
    """Takes two steps; returns the length of the longest row in tokens."""
    rows = rows_of(job)
    for _ in range(2):
        take_step(job, rows)
    return max(row.tokens for row in rows)


def planned_memory(
    built: RandomModel, case: argparse.Namespace, samples: Samples, tokens: int
) -> Memory:
    """The plan of these steps."""
    params = sum(p.numel() for p in built.model.parameters() if not p.requires_grad)
    sizes = model_sizes(built.native, params, built.family.attention_inputs)
    config = PlanConfig(
        device=case.device, dtype=case.dtype,
        gradient_checkpointing=case.checkpointing, tokens_per_microbatch=tokens,
    )  # fmt: skip
    encoding = encoding_of(samples.images, samples.processor)
    return estimate_memory(sizes, replace(memory_spec(config, sizes), encoding=encoding))
