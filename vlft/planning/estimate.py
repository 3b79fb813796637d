"""What a plan is made from: the sizes of a model, and what the data comes to. No weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vlft import console
from vlft.config import TOKENS_PER_ROW, gpu_gib
from vlft.errors import CheckpointError
from vlft.planning.memory import ENOUGH_TOKENS, SAFE_SHARE, Memory, MemorySpec, memory
from vlft.planning.published import KNOWN
from vlft.planning.sizes import TextSizes, language_params, lm_head_params, text_sizes, tower_scores

if TYPE_CHECKING:
    from vlft.checkpoints.locate import ModelFolder
    from vlft.config import PlanConfig

GIB = 2**30


@dataclass(frozen=True)
class Model:
    """What the memory of a model depends on.

    Attributes:
        name: folder or hub id.
        text: sizes of the LLM.
        others: numbers in towers, aligner and other parts.
        scores: of a head of the SAM tower's attention; 0 without one.
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
        images: distinct ones of both.
        image_tokens: that these become.
        tokens: of an epoch, before sharing.
        shared: of an epoch, after sharing.
        longest_sample: tokens.
        longest_row: tokens.
        rows: of an epoch.
        steps: of an epoch.
    """

    samples: int
    validation: int
    images: int
    image_tokens: int
    tokens: int
    shared: int
    longest_sample: int
    longest_row: int
    rows: int
    steps: int


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
    from vlft.families.registry import FAMILIES

    known = next(known for known in KNOWN if known.id == name)
    family = next(family for family in FAMILIES if family.name == known.family)
    language = language_params(known.text) + lm_head_params(known.text)
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
    others = max(0, total - language_params(text) - lm_head_params(text))
    inputs = folder.family.attention_inputs
    return Model(folder.name, text, others, tower_scores(native), inputs)


def plan_data(config: PlanConfig, folder: ModelFolder) -> DataPlan:
    """Reads and packs the samples of the first epoch, as the run would."""
    from vlft.training.samples import distinct_images, load_data, make_packer, make_schedule

    processor = folder.processor()
    data = load_data(config, processor)
    schedule = make_schedule(config, data[0])
    packer = make_packer(config, processor, device_of(config))
    outlines = data[0].outlines
    lengths = [outline.tokens for outline in outlines]
    rows = [
        row
        for indices in schedule.epoch(0)
        for row in packer.plan([outlines[index] for index in indices])
    ]
    images = distinct_images(data, processor)
    return DataPlan(
        samples=len(data[0]),
        validation=len(data[1]),
        images=len(images),
        image_tokens=sum(image.tokens for image in images),
        tokens=sum(lengths),
        shared=sum(row.tokens for row in rows),
        longest_sample=max(lengths),
        longest_row=max(row.tokens for row in rows),
        rows=len(rows),
        steps=schedule.steps_per_epoch,
    )


def gpu_bytes(gpu: str) -> float:
    """Memory of a GPU, by its name or its size.

    Raises:
        ConfigError: neither.
    """
    return gpu_gib(gpu) * GIB


def device_of(config: PlanConfig) -> str:
    """What the run is planned for: a GPU, unless the CPU is asked for."""
    return "cpu" if config.device == "cpu" else "cuda"


def tokens_of(config: PlanConfig) -> int:
    """Most tokens of a row."""
    return config.tokens_per_microbatch or TOKENS_PER_ROW[device_of(config)]


def row_tokens(config: PlanConfig, data: DataPlan | None, limit: int | None = None) -> int:
    """Tokens of the longest row: as long as the data makes it, if there is some.

    Args:
        config: of the run.
        data: of the run.
        limit: of a row, if not the settings' own.
    """
    limit = limit or tokens_of(config)
    return limit if data is None else max(data.longest_sample, min(data.longest_row, limit))


def memory_spec(config: PlanConfig, model: Model, data: DataPlan | None = None) -> MemorySpec:
    """What the settings ask for, every ``auto`` resolved."""
    gpu = device_of(config) == "cuda"
    width = 4 if config.dtype == "float32" or (config.dtype == "auto" and not gpu) else 2
    asked = MemorySpec(
        width=width,
        quantize=config.quantize,
        full=config.tuner == "full",
        targets=config.lora_target_modules,
        rank=config.lora_rank,
        checkpointing=bool(config.gradient_checkpointing),
        tokens=row_tokens(config, data),
        scores=model.scores,
        cached=config.vision_cache != "off" and not config.train_vision,
        cuda=gpu,
    )
    if config.gradient_checkpointing is None and gpu:
        # As the run chooses it, which tries.
        room = SAFE_SHARE * gpu_bytes(config.gpu)
        shorter = row_tokens(config, data, config.tokens_per_microbatch or ENOUGH_TOKENS)
        for tokens in (asked.tokens, shorter):
            kept = replace(asked, tokens=tokens)
            if _taken(model, kept).peak <= room:
                return kept
        return replace(asked, checkpointing=True)
    return asked


def memory_of(config: PlanConfig, model: Model, data: DataPlan | None = None) -> Memory:
    """What the run takes."""
    return _taken(model, memory_spec(config, model, data))


def _taken(model: Model, asked: MemorySpec) -> Memory:
    return memory(model.text, model.others, model.attention_inputs, asked)
