"""``vlft plan``: what a run would do and take, without a model and without a GPU."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from vlft import console
from vlft.planning.estimate import (
    GIB,
    DataPlan,
    Model,
    device_of,
    find_model,
    gpu_bytes,
    memory_of,
    memory_spec,
    plan_data,
    published,
    row_tokens,
    tokens_of,
)
from vlft.planning.published import KNOWN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlft.config import PlanConfig


# Of a GPU's memory that a run may take.
USABLE = 0.97
# Tokens of a row that are tried to make a run fit.
FEWER_TOKENS = (4096, 2048, 1024)


def run_plan(config: PlanConfig) -> None:
    """Prints the plan: of one run, or of every published model where none is named.

    Raises:
        VlftError: as ``vlft sft`` would.
    """
    # An unknown GPU is said first.
    gpu_bytes(config.gpu)
    if config.model is None and not config.dataset:
        for line in overview(config):
            console.out.print(line, markup=False)
        return
    model, folder = find_model(config)
    data = plan_data(config, folder) if folder is not None and config.dataset else None
    if config.train_vision or config.train_aligner:
        console.warn("what trains of towers and aligner, and what they keep, is not counted")
    for line in (*data_lines(config, data), *memory_lines(config, model, data)):
        console.out.print(line, markup=False)


def data_lines(config: PlanConfig, data: DataPlan | None) -> list[str]:
    """What the data comes to, for people."""
    if data is None:
        return []
    total = data.steps * config.num_train_epochs
    steps = min(total, config.max_steps) if config.max_steps else total
    saved = 1 - data.shared / data.tokens
    return [
        f"samples     {data.samples:,} for training, {data.validation:,} for validation, "
        f"{data.images:,} images",
        f"tokens      {data.tokens:,} an epoch, {data.shared:,} after sharing ({saved:.0%} saved)",
        f"longest     sample {data.longest_sample:,} tokens, row {data.longest_row:,}",
        f"an epoch    {data.rows:,} rows in {data.steps:,} steps; {steps:,} steps in all",
    ]


def memory_lines(config: PlanConfig, model: Model, data: DataPlan | None) -> list[str]:
    """What the run takes, and whether it fits, for people."""
    found, asked = memory_of(config, model, data), memory_spec(config, model, data)
    again = ", with checkpointing" if asked.checkpointing else ""
    parts = [
        ("weights", found.weights, ""),
        ("trained", found.trained, "with gradients and moments"),
        ("activations", found.activations, f"of a row of {asked.tokens:,} tokens{again}"),
        ("features", found.features, "and embeddings of the row"),
        ("a moment", found.moment, "logits, or gradients of a layer"),
        ("runtime", found.runtime, "CUDA and its libraries"),
        ("a step", found.step, ""),
        ("encoding", found.encoding, "images, before step one"),
    ]
    lines = [f"{name:<12}{shown_bytes(value):>9}  {note}".rstrip() for name, value, note in parts]
    if data is not None and config.vision_cache != "off" and not config.train_vision:
        disk = data.image_tokens * model.text.hidden * asked.width
        lines.append(f"{'disk':<12}{shown_bytes(disk):>9}  of features, --vision-cache disk")
    return [*lines, verdict(config, model, data)]


def shown_bytes(value: float) -> str:
    """Bytes for people."""
    return f"{value / GIB:.1f} GiB" if value >= GIB else f"{value / 2**20:.0f} MiB"


def verdict(config: PlanConfig, model: Model, data: DataPlan | None = None) -> str:
    """Whether it fits, and which flags would make it."""
    peak = memory_of(config, model, data).peak
    needs = f"needs {shown_bytes(peak)}"
    if device_of(config) == "cpu":
        return f"{needs} of main memory, beside Python and its libraries"
    on = f"{config.gpu} ({gpu_bytes(config.gpu) / GIB:.0f} GiB)"
    if fits(config, model, data):
        return f"fits on {on}: {needs}"
    return f"does not fit on {on}: {needs}; {remedy(config, model, data)}"


def fits(config: PlanConfig, model: Model, data: DataPlan | None = None) -> bool:
    """Whether the GPU has room for it."""
    return memory_of(config, model, data).peak <= USABLE * gpu_bytes(config.gpu)


def remedy(config: PlanConfig, model: Model, data: DataPlan | None = None) -> str:
    """Which flags make it fit."""
    for flags, changed in easier(config, data):
        if fits(changed, model, data):
            peak = memory_of(changed, model, data).peak
            return f"fits with {flags} ({shown_bytes(peak)})"
    return "no flag makes it fit"


def easier(config: PlanConfig, data: DataPlan | None = None) -> Iterator[tuple[str, PlanConfig]]:
    """Settings that take less, the least change first: (flags, settings)."""
    # A row holds the longest sample, whatever its limit.
    least = data.longest_sample if data is not None else 1
    tokens = [None, *(n for n in FEWER_TOKENS if least <= n < row_tokens(config, data))]
    quantized = ["none", "nf4"] if config.tuner == "lora" and config.quantize == "none" else [None]
    checkpointing = [False, True] if config.gradient_checkpointing is False else [False]
    for quantize in quantized:
        for recompute in checkpointing:
            for limit in tokens:
                flags: list[str] = []
                changes: dict[str, object] = {}
                if recompute:
                    flags.append("--gradient-checkpointing")
                    changes["gradient_checkpointing"] = True
                if quantize == "nf4":
                    flags.append("--quantize nf4")
                    changes["quantize"] = quantize
                if limit is not None:
                    flags.append(f"--tokens-per-microbatch {limit}")
                    changes["tokens_per_microbatch"] = limit
                if flags:
                    yield " ".join(flags), dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def overview(config: PlanConfig) -> list[str]:
    """Every published model: GiB of LoRA and QLoRA, and what a GPU of this size takes."""
    on_gpu = device_of(config) == "cuda"
    if on_gpu and config.gradient_checkpointing is None:
        # What a run takes at least: with more room it does without.
        config = dataclasses.replace(config, gradient_checkpointing=True)
    again = ", with checkpointing" if config.gradient_checkpointing else ""
    columns = [(q, t) for t in ("qkv", "ALL") for q in ("none", "nf4")]
    lines = [
        f"GiB at the peak, rows of {tokens_of(config):,} tokens{again}",
        f"{'':<36}{'LoRA qkv':>10}{'QLoRA qkv':>11}{'LoRA ALL':>10}{'QLoRA ALL':>11}"
        + (f"  LoRA on {config.gpu}" if on_gpu else ""),
    ]
    for known in KNOWN:
        model = published(known.id)
        line = f"{known.id:<36}"
        for (quantize, targets), width in zip(columns, (10, 11, 10, 11), strict=True):
            changed = dataclasses.replace(config, quantize=quantize, lora_target_modules=targets)
            line += f"{memory_of(changed, model).peak / GIB:>{width}.1f}"
        if on_gpu:
            line += "  fits" if fits(config, model) else f"  {remedy(config, model)}"
        lines.append(line)
    return lines
