"""``vlft plan``: what a run would do and take, without a model and without a GPU."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlft import console
from vlft.config import GPUS, PlanConfig
from vlft.errors import CheckpointError, ConfigError
from vlft.families.known import KNOWN
from vlft.families.sizes import TextSizes, head_size, language_size, text_sizes, tower_scores
from vlft.training.memory import Asked, Memory, memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlft.checkpoints.locate import ModelFolder

GIB = 2**30
# Of a GPU's memory that a run may take.
USABLE = 0.97
# Tokens of a row where nothing is said, and what is tried to make a run fit.
TOKENS, FEWER_TOKENS = 8192, (4096, 2048, 1024)


@dataclass(frozen=True)
class Model:
    """What the memory of a model depends on.

    Attributes:
        name: folder or hub id.
        text: sizes of the LLM.
        others: numbers in towers, aligner and other parts.
        scores: of the SAM tower's attention; 0 without one.
        attention_inputs: ends of the names that ``qkv`` means.
    """

    name: str
    text: TextSizes
    others: int
    scores: int
    attention_inputs: tuple[str, ...]


@dataclass(frozen=True)
class DataPlan:
    """What the data comes to.

    Attributes:
        samples: for training.
        validation: samples for validation.
        pictures: distinct ones of both.
        picture_tokens: that these become.
        tokens: of an epoch, before sharing.
        shared: of an epoch, after sharing.
        longest_sample: tokens.
        longest_row: tokens.
        rows: of an epoch.
        steps: of an epoch.
    """

    samples: int
    validation: int
    pictures: int
    picture_tokens: int
    tokens: int
    shared: int
    longest_sample: int
    longest_row: int
    rows: int
    steps: int


def run_plan(config: PlanConfig) -> None:
    """Prints the plan: of one run, or of every published model where none is named.

    Raises:
        VlftError: as ``vlft sft`` would.
    """
    size = gpu_bytes(config.gpu)
    if config.model is None and not config.dataset:
        for line in overview(config, size):
            console.out.print(line, markup=False)
        return
    model, folder = find_model(config)
    data = plan_data(config, folder) if folder is not None and config.dataset else None
    if data is not None and config.tokens_per_microbatch is None:
        # A row is never longer than the data makes it.
        config = dataclasses.replace(config, tokens_per_microbatch=data.longest_row)
    for line in (*data_lines(config, data), *memory_lines(config, model, data, size)):
        console.out.print(line, markup=False)


def gpu_bytes(gpu: str) -> float:
    """Memory of a GPU, by its name or its size.

    Raises:
        ConfigError: neither.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB|GiB)?", gpu, re.IGNORECASE)
    gib = float(found[1]) if found else GPUS.get(gpu.lower().replace(" ", ""))
    if not gib:
        names = ", ".join(GPUS)
        raise ConfigError(f"found {gpu!r}", place="--gpu", hint=f"a size like 24GB, or {names}")
    return gib * GIB


def find_model(config: PlanConfig) -> tuple[Model, ModelFolder | None]:
    """The model and, where the data asks for its tokenizer or nothing else tells, its folder."""
    known = next((known for known in KNOWN if known.id == config.model), None)
    folder = None
    if known is None or config.dataset:
        from vlft.checkpoints.locate import locate_model

        folder = locate_model(config.model, revision=config.revision, hub=config.hub, weights=False)
    if known is not None:
        return published(known.id), folder
    if folder is None:
        raise CheckpointError("no such model", place=f"--model {config.model}")
    return model_of(folder), folder


def published(name: str) -> Model:
    """A published model, from what is known of it."""
    from vlft.families.table import FAMILIES

    known = next(known for known in KNOWN if known.id == name)
    family = next(family for family in FAMILIES if family.name == known.family)
    language = language_size(known.text) + head_size(known.text)
    others = round(known.billions * 1e9) - language
    return Model(name, known.text, others, known.scores, family.attention_inputs)


def model_of(folder: ModelFolder) -> Model:
    """The model of a folder, from its config and the heads of its weight files."""
    from vlft.checkpoints.weights import count_numbers

    native = folder.native_config(0)
    text = text_sizes(native["text_config"])
    try:
        total = count_numbers(folder.path)
    except CheckpointError:
        console.warn(f"{folder.path} holds no weights; towers and aligner are not counted")
        total = 0
    others = max(0, total - language_size(text) - head_size(text))
    inputs = folder.family.attention_inputs
    return Model(folder.name, text, others, tower_scores(native), inputs)


def plan_data(config: PlanConfig, folder: ModelFolder) -> DataPlan:
    """Reads and packs the samples of the first epoch, as the run would."""
    from vlft.packing.prefix_tree import to_paths
    from vlft.packing.schedule import plan_rows
    from vlft.training.samples import distinct_images, load_data, make_schedule

    processor = folder.processor()
    data = load_data(config, processor)
    schedule = make_schedule(config, data[0])
    limit = config.tokens_per_microbatch or TOKENS
    lengths: list[int] = []
    rows = []
    for indices in schedule.epoch(0):
        samples = [data[0][index] for index in indices]
        paths = to_paths(samples, processor.chat.image_token_id)
        lengths += [len(path.keys) for path in paths]
        rows += plan_rows(
            paths, limit, share=config.share_prefix, joined_tokens=limit if on_gpu(config) else 1024
        )
    images = distinct_images(data, processor)
    return DataPlan(
        samples=len(data[0]),
        validation=len(data[1]),
        pictures=len(images),
        picture_tokens=sum(image.tokens for image in images),
        tokens=sum(lengths),
        shared=sum(row.tokens for row in rows),
        longest_sample=max(lengths),
        longest_row=max(row.tokens for row in rows),
        rows=len(rows),
        steps=schedule.steps_per_epoch,
    )


def on_gpu(config: PlanConfig) -> bool:
    """Whether the run is planned for a GPU; it is, unless the CPU is asked for."""
    return config.device != "cpu"


def asked_of(config: PlanConfig, model: Model) -> Asked:
    """What the settings ask for, every ``auto`` resolved."""
    gpu = on_gpu(config)
    width = 4 if config.dtype == "float32" or (config.dtype == "auto" and not gpu) else 2
    checkpointing = config.gradient_checkpointing
    return Asked(
        width=width,
        quantize=config.quantize,
        full=config.tuner == "full",
        targets=config.lora_target_modules,
        rank=config.lora_rank,
        checkpointing=gpu if checkpointing is None else checkpointing,
        tokens=config.tokens_per_microbatch or TOKENS,
        scores=model.scores,
        cached=config.vision_cache != "off" and not config.train_vision,
        cuda=gpu,
    )


def memory_of(config: PlanConfig, model: Model) -> Memory:
    """What the run takes."""
    return memory(model.text, model.others, model.attention_inputs, asked_of(config, model))


def data_lines(config: PlanConfig, data: DataPlan | None) -> list[str]:
    """What the data comes to, for people."""
    if data is None:
        return []
    total = data.steps * config.num_train_epochs
    steps = min(total, config.max_steps) if config.max_steps else total
    saved = 1 - data.shared / data.tokens
    return [
        f"samples     {data.samples:,} for training, {data.validation:,} for validation, "
        f"{data.pictures:,} pictures",
        f"tokens      {data.tokens:,} an epoch, {data.shared:,} after sharing ({saved:.0%} saved)",
        f"longest     sample {data.longest_sample:,} tokens, row {data.longest_row:,}",
        f"an epoch    {data.rows:,} rows in {data.steps:,} steps; {steps:,} steps in all",
    ]


def memory_lines(config: PlanConfig, model: Model, data: DataPlan | None, size: float) -> list[str]:
    """What the run takes, and whether it fits, for people."""
    found = memory_of(config, model)
    tokens = config.tokens_per_microbatch or TOKENS
    parts = [
        ("weights", found.weights, ""),
        ("trained", found.trained, "with gradients and moments"),
        ("activations", found.activations, f"of a row of {tokens:,} tokens"),
        ("features", found.features, "and embeddings of the row"),
        ("a moment", found.moment, "logits, or gradients of a layer"),
        ("runtime", found.runtime, "CUDA and its libraries"),
        ("a step", found.step, ""),
        ("encoding", found.encoding, "pictures, before step one"),
    ]
    lines = [f"{name:<12}{shown_bytes(value):>9}  {note}".rstrip() for name, value, note in parts]
    if data is not None and config.vision_cache != "off":
        width = asked_of(config, model).width
        disk = data.picture_tokens * model.text.hidden * width
        lines.append(f"{'disk':<12}{shown_bytes(disk):>9}  of features, --vision-cache disk")
    return [*lines, verdict(config, model, size)]


def shown_bytes(value: float) -> str:
    """Bytes for people."""
    return f"{value / GIB:.1f} GiB" if value >= GIB else f"{value / 2**20:.0f} MiB"


def verdict(config: PlanConfig, model: Model, size: float) -> str:
    """Whether it fits, and which flags would make it."""
    peak = memory_of(config, model).peak
    needs = f"needs {shown_bytes(peak)}"
    if not on_gpu(config):
        return f"{needs} of main memory, beside Python and its libraries"
    on = f"{config.gpu} ({size / GIB:.0f} GiB)"
    if peak <= USABLE * size:
        return f"fits on {on}: {needs}"
    for flags, changed in easier(config):
        lower = memory_of(changed, model).peak
        if lower <= USABLE * size:
            return f"does not fit on {on}: {needs}; fits with {flags} ({shown_bytes(lower)})"
    return f"does not fit on {on}: {needs}; no flag makes it fit"


def easier(config: PlanConfig) -> Iterator[tuple[str, PlanConfig]]:
    """Settings that take less, the least change first: (flags, settings)."""
    tokens = [None, *(n for n in FEWER_TOKENS if n < (config.tokens_per_microbatch or TOKENS))]
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


def overview(config: PlanConfig, size: float) -> list[str]:
    """Every published model: GiB of LoRA and QLoRA, and what a GPU of this size takes."""
    columns = [(q, t) for t in ("qkv", "ALL") for q in ("none", "nf4")]
    lines = [
        f"GiB at the peak, rows of {config.tokens_per_microbatch or TOKENS:,} tokens",
        f"{'':<36}{'LoRA qkv':>10}{'QLoRA qkv':>11}{'LoRA ALL':>10}{'QLoRA ALL':>11}  "
        f"LoRA on {config.gpu}",
    ]
    for known in KNOWN:
        model = published(known.id)
        cells = []
        for quantize, targets in columns:
            changed = dataclasses.replace(config, quantize=quantize, lora_target_modules=targets)
            cells.append(memory_of(changed, model).peak / GIB)
        words = verdict(config, model, size)
        short = "fits" if words.startswith("fits") else words.rpartition("; ")[2]
        lines.append(
            f"{Path(known.id)!s:<36}{cells[0]:>10.1f}{cells[1]:>11.1f}{cells[2]:>10.1f}"
            f"{cells[3]:>11.1f}  {short}"
        )
    return lines
