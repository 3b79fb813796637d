"""``vlft plan``: what a run of one process would do, and the memory that it takes.

No weight is read and no GPU is needed.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlft import console
from vlft.errors import printable
from vlft.gpus import abilities, gpu_gib
from vlft.planning.estimate import (
    GIB,
    find_model,
    memory_spec,
    plan_data,
    planned_device,
    published_sizes,
    row_tokens,
)
from vlft.planning.memory import estimate_memory
from vlft.planning.published import PUBLISHED_MODELS
from vlft.settings import check, flag, given

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlft.config import PlanConfig
    from vlft.planning.estimate import DataPlan
    from vlft.planning.sizes import ModelSizes

# Share of a GPU's memory that a run can use. The rest is assumed to be what torch's allocator holds
# on to beside the tensors: blocks are rounded up, and rows of other lengths leave holes.
_USABLE = 0.97
# Limits of a row in tokens that are tried to make a run fit.
_SHORTER_ROWS = (4096, 2048, 1024)


def run_plan(config: PlanConfig) -> None:
    """Prints the plan: of one run, or of every published model where none is named.

    Raises:
        VlftError: as ``vlft sft`` would.
    """
    config = check(config)
    if config.is_overview:
        lines = overview(config)
    else:
        model, folder = find_model(config)
        data = plan_data(config, folder) if folder is not None and config.dataset else None
        more = given(config, "train_vision", "train_aligner", "train_gen_aligner", "train_gen_head")
        if more:
            console.warn(f"gradients, moments and activations of {more} are not counted")
        lines = _data_lines(data) if data is not None else []
        lines += _memory_lines(config, model, data)
        lines.append(verdict(config, model, data))
    if planned_device(config) == "cuda" and (works := abilities(config.gpu)):
        lines.append(works)
    for line in "\n".join(lines).splitlines():
        console.out.print(printable(line), markup=False)


def overview(config: PlanConfig) -> list[str]:
    """A table of all published models: peak memory, and the flags with which LoRA fits."""
    on_gpu = planned_device(config) == "cuda"
    if on_gpu and config.gradient_checkpointing is None:
        # The least that a run needs: where there is more memory, it runs without.
        config = replace(config, gradient_checkpointing=True)
    variants = [
        replace(config, quantize=quantize, lora_target_modules=targets)
        for quantize in ("none", "nf4")
        for targets in ("qkv", "ALL")
    ]
    lines = [
        f"peak memory in GiB, rows of {row_tokens(config):,} tokens"
        + _checkpointing_note(config.gradient_checkpointing),
        f"{'':<35}LoRA  LoRA QLoRA QLoRA",
        f"{'':<36}qkv   ALL   qkv   ALL" + f"  on {gpu_gib(config.gpu):g} GiB" * on_gpu,
    ]
    for published in PUBLISHED_MODELS:
        model = published_sizes(published)
        peaks = (_peak(variant, model) / GIB for variant in variants)
        line = f"{published.id:<33}" + "".join(f"{peak:>6.1f}" for peak in peaks)
        if on_gpu:
            flags, _ = _remedy(variants[0], model)
            remedy = f"with {flags}" if flags else "does not fit"
            answer = "fits" if _fits(variants[0], model) else remedy
            # Several flags stand on a line of their own, as a terminal may have 80 columns.
            line += ("  " if len(line) + len(answer) <= 78 else "\n    ") + answer
        lines.append(line)
    return lines


def verdict(config: PlanConfig, model: ModelSizes, data: DataPlan | None = None) -> str:
    """Whether the run fits, and with which flags it would."""
    needs = f"needs {_shown_bytes(_peak(config, model, data))}"
    if planned_device(config) == "cpu":
        return f"{needs} of main memory, beside Python and its libraries"
    gpu = f"{config.gpu} ({gpu_gib(config.gpu):.0f} GiB)"
    if _fits(config, model, data):
        return f"fits on {gpu}: {needs}"
    flags, peak = _remedy(config, model, data)
    remedy = f"fits with {flags} ({_shown_bytes(peak)})" if flags else "no flag makes it fit"
    return f"does not fit on {gpu}: {needs}; {remedy}"


def smaller_settings(
    config: PlanConfig, data: DataPlan | None = None
) -> Iterator[tuple[str, PlanConfig]]:
    """Settings that take less memory, the smallest change first: (flags, settings)."""
    # A row is never shorter than the longest sample.
    shortest = data.longest_sample if data is not None else 1
    limits = [n for n in _SHORTER_ROWS if shortest <= n < row_tokens(config, data)]
    quantize = ["nf4"] if config.tuner == "lora" and config.quantize == "none" else []
    checkpointing = [True] if config.gradient_checkpointing is False else []
    choices = itertools.product([None, *quantize], [None, *checkpointing], [None, *limits])
    for nf4, on, limit in choices:
        fields = {"gradient_checkpointing": on, "quantize": nf4, "tokens_per_microbatch": limit}
        changes: dict[str, Any] = {k: value for k, value in fields.items() if value is not None}
        if changes:
            flags = (flag(k) if v is True else f"{flag(k)} {v}" for k, v in changes.items())
            yield " ".join(flags), replace(config, **changes)


def _data_lines(data: DataPlan) -> list[str]:
    saved = 1 - data.packed_tokens / data.tokens
    return [
        f"samples     {data.samples:,} for training, {data.validation:,} for validation, "
        f"{data.images:,} images",
        f"tokens      {data.tokens:,} an epoch, {data.packed_tokens:,} after sharing prefixes "
        f"({saved:.0%} saved)",
        f"longest     sample {data.longest_sample:,} tokens, row {data.longest_row:,}",
        f"an epoch    {data.rows:,} rows in {data.steps:,} steps; "
        f"{data.total_steps:,} steps in all",
    ]


def _memory_lines(config: PlanConfig, model: ModelSizes, data: DataPlan | None) -> list[str]:
    spec = memory_spec(config, model, data)
    memory = estimate_memory(model, spec)
    row = f"of a row of {spec.tokens:,} tokens{_checkpointing_note(spec.checkpointing)}"
    notes = {
        "weights": "frozen",
        "trained": "trainable weights, gradients, moments",
        "activations": row,
        "features": "image features and embeddings of the row",
        "transient": "logits, or the gradients of one layer",
        "runtime": "CUDA and its libraries",
        "step": "sum of the above",
        "encoding": "peak while images are encoded, before step one",
    }
    parts = [(name, getattr(memory, name), note) for name, note in notes.items()]
    if data is not None and config.vision_cache != "off" and not config.train_vision:
        disk = data.image_tokens * model.text.hidden_size * spec.weight_bytes
        parts.append(("disk", disk, "image features, --vision-cache disk"))
    return [f"{name:<12}{_shown_bytes(value):>9}  {note}" for name, value, note in parts]


def _peak(config: PlanConfig, model: ModelSizes, data: DataPlan | None = None) -> float:
    return estimate_memory(model, memory_spec(config, model, data)).peak


def _fits(config: PlanConfig, model: ModelSizes, data: DataPlan | None = None) -> bool:
    return _peak(config, model, data) <= _USABLE * gpu_gib(config.gpu) * GIB


def _remedy(
    config: PlanConfig, model: ModelSizes, data: DataPlan | None = None
) -> tuple[str, float]:
    """The flags that make the run fit, and its peak with them; no flags if none do."""
    for flags, smaller in smaller_settings(config, data):
        if _fits(smaller, model, data):
            return flags, _peak(smaller, model, data)
    return "", 0.0


def _checkpointing_note(on: bool | None) -> str:
    return ", gradient checkpointing on" if on else ""


def _shown_bytes(value: float) -> str:
    return f"{value / GIB:.1f} GiB" if value >= GIB else f"{value / 2**20:.0f} MiB"
