"""The peak memory that ``vlft plan`` predicts, against the measured peak of training.

Measured is all that a process holds beside its libraries: model, LoRA, optimiser, and two steps on
rows of the workload. Each model and workload runs in a process of its own.

    python -m benchmarks plan --output benchmarks/results/plan-cpu
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from benchmarks.command import changed, new_parser, note, prepare, publish
from benchmarks.job import encode_images, make_job, rows_of
from benchmarks.measure import GIB, apart, measure
from benchmarks.sides import add_job_options, cases_of, make_samples
from vlft.config import PlanConfig
from vlft.planning.estimate import memory_spec
from vlft.planning.memory import estimate_memory
from vlft.planning.sizes import model_sizes
from vlft.training.loop import take_step
from vlft.training.model import set_checkpointing

if TYPE_CHECKING:
    import argparse

    from benchmarks.models import RandomModel

COLUMNS = {
    "model": "{model}", "workload": "{workload}", "checkpointing": "{checkpointing}",
    "tokens of a row": "{tokens}", "planned, GiB": "{planned_gib:.2f}",
    "measured, GiB": "{measured_gib:.2f}", "planned / measured": "{ratio:.2f}",
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measures, writes the files, prints the table."""
    parser = new_parser("plan", __doc__, repeats=1)
    add_job_options(parser, workloads=["q5", "mixed"], dtype="float32")
    options = parser.parse_args(arguments)
    _, content = prepare(options)
    results = []
    for model in options.models:
        for case in cases_of(options, model):
            results += [apart(run, changed(case, checkpointing=on)) for on in (False, True)]
            note(f"{model}, {case.workload}: done")
    publish(options, content, COLUMNS, results)


def run(case: argparse.Namespace) -> dict[str, Any]:
    """Plans and measures a model on a workload, with or without gradient checkpointing."""
    # Loads all libraries, so that they count as held before.
    train(changed(case, scale="tiny"))
    held: list[RandomModel] = []

    def compute() -> int:
        built, tokens = train(case)
        held.append(built)
        return tokens

    measured = measure(compute, torch.device(case.device))
    tokens = int(measured.value)
    planned = planned_bytes(held[0], case, tokens)
    return {
        "model": case.model, "workload": case.workload, "tokens": tokens,
        "checkpointing": "yes" if case.checkpointing else "no",
        "planned_gib": planned / GIB, "measured_gib": measured.peak_bytes / GIB,
        "ratio": planned / measured.peak_bytes,
    }  # fmt: skip


def train(case: argparse.Namespace) -> tuple[RandomModel, int]:
    """Makes a model, takes two steps; returns it and the length of the longest row in tokens."""
    built, samples = make_samples(case)
    if case.checkpointing:
        set_checkpointing(built.model, on=True)
    job = make_job(built, samples)
    encode_images(job, samples)
    rows = rows_of(job)
    for _ in range(2):
        take_step(job, rows)
    return built, max(row.tokens for row in rows)


def planned_bytes(built: RandomModel, case: argparse.Namespace, tokens: int) -> float:
    """The planned peak, without CUDA's context, which is not measured either."""
    params = sum(p.numel() for p in built.model.parameters() if not p.requires_grad)
    sizes = model_sizes(built.native, params, built.family.attention_inputs)
    config = PlanConfig(
        device=case.device, dtype=case.dtype,
        gradient_checkpointing=case.checkpointing, tokens_per_microbatch=tokens,
    )  # fmt: skip
    memory = estimate_memory(sizes, memory_spec(config, sizes))
    return memory.peak - memory.runtime
