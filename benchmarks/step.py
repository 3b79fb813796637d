"""Optimiser steps of the published models at their true sizes, on the device.

Random weights of the true shapes go the way of a downloaded model: they are read from a folder,
which ``benchmarks fake`` writes. A step takes 16 samples of a workload; their rows, attention, loss
and update are those of ``vlft sft``. The share is that of the model's arithmetic, repeated forward
passes of checkpointing not counted, in the rate of a large matrix product in the same process.

    python -m benchmarks step --output benchmarks/results/gpu-steps
    python -m benchmarks step --device cpu --scale tiny
"""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.command import DTYPES, changed, markdown, new_parser, note, prepare, record
from benchmarks.fake import find_published, golden_folder, write_fake
from benchmarks.job import encode_images, make_job, rows_of
from benchmarks.measure import GIB, matrix_rate, measure, peak_bytes
from benchmarks.models import MODELS, SCALES, with_lora
from benchmarks.samples import WORKLOADS, random_samples
from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import describe
from vlft.checkpoints.placement import Placement
from vlft.config import TOKENS_PER_ROW
from vlft.errors import VlftError, is_out_of_memory
from vlft.models.compiled import compile_layers
from vlft.planning.sizes import language_weights, lm_head_params, text_sizes
from vlft.training.loop import take_step
from vlft.training.model import set_checkpointing
from vlft.vision.cache import release_towers

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from vlft.packing.batch import PackedBatch
    from vlft.packing.packer import RowPlan
    from vlft.planning.sizes import TextSizes
    from vlft.training.job import Job

# The most telling first.
TESTED = {
    "1.3b": "deepseek-vl-1.3b-chat", "7b": "deepseek-vl-7b-chat",
    "vl2-tiny": "deepseek-vl2-tiny", "vl2-small": "deepseek-vl2-small",
}  # fmt: skip
USUAL = {
    "targets": "qkv", "quantize": "none", "checkpointing": False, "attn": "auto", "compile": "off",
}  # fmt: skip
# What differs from the usual settings, one after the other.
VARIANTS: tuple[dict[str, Any], ...] = (
    {}, {"compile": "on"}, {"checkpointing": True}, {"attn": "flex"}, {"quantize": "nf4"},
    {"targets": "ALL"}, {"attn": "eager"},
    {"targets": "ALL", "quantize": "nf4", "checkpointing": True},
)  # fmt: skip
SHORTEST_ROW = 1024
COLUMNS = {
    "model": "{model}", "data": "{workload}", "LoRA": "{targets}", "weights": "{quantize}",
    "checkpointing": "{checkpointing}", "attention": "{attn}", "compiled": "{compile}",
    "tokens of a row": "{row_tokens}", "s a step": "{seconds:.3f}", "tokens/s": "{rate:.0f}",
    "peak, GiB": "{peak_gib:.2f}",
    "TFLOP/s": "{teraflops:.2f}", "of the matrix rate": "{share:.3f}", "loss": "{loss:.4f}",
    "note": "{note}",
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measures, writes the files after every case, prints the table."""
    parser = new_parser("step", __doc__, repeats=5)
    add = parser.add_argument
    add("--models", nargs="+", default=list(TESTED), choices=list(TESTED), help="default: all")
    shown = "; default: q1 with all settings, q5 with the usual ones"
    add("--workloads", nargs="+", default=["q1", "q5"], choices=list(WORKLOADS), help=shown[2:])
    add("--scale", default="true", choices=("true", *SCALES[1:]), help="tiny: golden checkpoints")
    add("--dtype", default="bfloat16", choices=DTYPES)
    add("--samples", type=int, default=16, help="of an optimiser step; default: 16")
    options = parser.parse_args(arguments)
    device, content = prepare(options)
    rate = matrix_rate(device, DTYPES[options.dtype])
    content["matrix_rate_teraflops"] = rate / 1e12
    note(f"matrix rate: {rate / 1e12:.1f} TFLOP/s")
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            path = model_folder(model, options.scale, Path(folder) / "model")
            for case in cases_of(options, model):
                named = {name: getattr(case, name) for name in ("model", "workload", *USUAL)}
                record(options, content, COLUMNS, {**named, **attempt(path, case, rate)})
    print(markdown(COLUMNS, content["results"]))


def model_folder(model: str, scale: str, new: Path) -> Path:
    """A folder with the model's true shapes, or the golden checkpoint of its family."""
    if scale == "tiny":
        return golden_folder(find_published(TESTED[model]))
    new.parent.mkdir(exist_ok=True)
    shutil.rmtree(new, ignore_errors=True)
    write_fake(TESTED[model], new)
    return new


def cases_of(options: argparse.Namespace, model: str) -> Iterator[argparse.Namespace]:
    """All settings on the first workload, the usual ones on the others."""
    first, *others = options.workloads
    named = changed(options, model=model)
    for variant in VARIANTS:
        # FlexAttention has no backward pass on the CPU.
        if (options.device, variant.get("attn")) != ("cpu", "flex"):
            yield changed(named, workload=first, **{**USUAL, **variant})
    for workload in others:
        yield changed(named, workload=workload, **USUAL)


def attempt(path: Path, case: argparse.Namespace, rate: float) -> dict[str, Any]:
    """The figures of a case, with shorter rows if it runs out of memory, or why there are none."""
    limit: int | None = None
    problem = ""
    while not problem:
        try:
            return run(path, case, rate, limit)
        except (VlftError, RuntimeError, NotImplementedError) as error:
            # An error of one case must not keep the others from running. Only its text is kept:
            # with its frames it would keep the model on the GPU.
            full = is_out_of_memory(error.__cause__ or error)
            text = str(error).splitlines()[0][:120]
        limit = (limit or TOKENS_PER_ROW[case.device]) // 2
        problem = "" if full and limit >= SHORTEST_ROW else text
    nothing = ("seconds", "rate", "peak_gib", "teraflops", "share", "loss")
    return {**dict.fromkeys(nothing, math.nan), "row_tokens": 0, "note": problem}


def run(path: Path, case: argparse.Namespace, rate: float, limit: int | None) -> dict[str, Any]:
    """The figures of a case; ``limit`` is that of a row, in tokens."""
    gc.collect()
    device = torch.device(case.device)
    folder = describe(path)
    attn = "sdpa" if case.attn == "auto" else case.attn
    placement = Placement(device, DTYPES[case.dtype], case.quantize, attn)
    pixels, family = folder.processor().pixels, folder.family
    tiles = next(tiles for name, tiles in MODELS.values() if name == family.name)
    native = folder.native_config()
    torch.manual_seed(0)
    built = with_lora(load_model(folder, placement), family, native, pixels, tiles, case.targets)
    samples = random_samples(WORKLOADS[case.workload], built, case.samples)
    limits = {"tokens_per_microbatch": limit} if limit else {}
    job = make_job(built, samples, lora_target_modules=case.targets, **limits)
    set_checkpointing(built.model, on=case.checkpointing)
    encode_images(job, samples)
    release_towers(built.model, samples.processor)
    if case.compile == "on":
        compile_layers(built.model.get_submodule(family.parts.language))
    plans = rows_of(job)
    first, _ = take_step(job, plans)

    def steps() -> float:
        for _ in range(case.repeats):
            losses, _ = take_step(job, plans)
        return losses.total

    measured = measure(steps, device, case.clock)
    seconds = measured.seconds / case.repeats
    operations = step_operations(text_sizes(native["text_config"]), job, plans)
    return {
        "row_tokens": plans[0].tokens, "rows": len(plans), "seconds": seconds,
        "tokens": sum(plan.sample_tokens for plan in plans),
        "packed_tokens": sum(plan.tokens for plan in plans),
        "rate": sum(plan.tokens for plan in plans) / seconds,
        "peak_gib": peak_bytes(device) / GIB, "teraflops": operations / seconds / 1e12,
        "share": operations / seconds / rate, "loss": first.total / samples.targets, "note": "",
    }  # fmt: skip


def step_operations(text: TextSizes, job: Job, plans: Sequence[RowPlan]) -> float:
    """Operations of a step: the LLM's products and attention, and the logits that have a target."""
    packer = job.planner.packer
    rows = [packer.row([job.train[index] for index in plan.members]) for plan in plans]
    return sum(row_operations(text, row) for row in rows)


def row_operations(text: TextSizes, row: PackedBatch) -> float:
    """Those of a row, forward and backward.

    The weights are frozen, so that a product has one gradient, that of its input. Attention's have
    two each. LoRA's own products, a hundredth, are not counted.
    """
    tokens, sources = len(row), len(row.source)
    last = f".{text.num_hidden_layers - 1}.mlp."
    products = sources * (lm_head_params(text) or text.vocab_size * text.hidden_size)
    for name, shape in language_weights(text, "").items():
        used = text.num_experts_per_tok / text.n_routed_experts if len(shape) == 3 else 1.0
        # The last feed-forward part runs at the positions that have a target alone.
        products += int(used * prod(shape)) * (sources if last in name else tokens)
    scores = int((row.position_ids + 1).sum()) * text.num_hidden_layers
    return 4.0 * products + 6.0 * scores * (text.query_width + text.value_width)
