"""From the flags of a run to the sizes of its model, its data and its memory; reads no weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from vlft import console
from vlft.config import TOKENS_PER_ROW
from vlft.errors import CheckpointError, shown
from vlft.gpus import gpu_gib
from vlft.planning.memory import (
    ENOUGH_TOKENS,
    SAFE_SHARE,
    Encoding,
    MemorySpec,
    estimate_memory,
)
from vlft.planning.published import PUBLISHED_MODELS, PublishedModel
from vlft.planning.sizes import ModelSizes, language_params, lm_head_params, model_sizes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlft.checkpoints.locate import ModelFolder
    from vlft.config import PlanConfig
    from vlft.data.encode import EncodedImage
    from vlft.families.processor import Processor

GIB = 2**30


@dataclass(frozen=True)
class DataPlan:
    """What the first epoch of a run of one process comes to; lengths are in tokens.

    Attributes:
        samples: of the epoch, repeated ones too.
        images: distinct images of training and validation.
        image_tokens: of these images.
        packed_tokens: of all rows, where shared prefixes count once.
        total_steps: of the whole run.
        encoding: the images that are encoded before step one; None if there are none.
    """

    samples: int
    validation: int
    images: int
    image_tokens: int
    tokens: int
    packed_tokens: int
    longest_sample: int
    longest_row: int
    rows: int
    steps: int
    total_steps: int
    encoding: Encoding | None


def find_model(config: PlanConfig) -> tuple[ModelSizes, ModelFolder | None]:
    """The sizes of the model, and its folder; None for a published model without data.

    Its sizes are known and nothing is downloaded. Data needs the tokenizer in the folder.
    """
    published = next((known for known in PUBLISHED_MODELS if known.id == config.model), None)
    if published is not None and not config.dataset:
        return published_sizes(published), None
    from vlft.checkpoints.locate import locate_model

    folder = locate_model(config.model, revision=config.revision, hub=config.hub, weights=False)
    return published_sizes(published) if published else _folder_sizes(folder), folder


def published_sizes(model: PublishedModel) -> ModelSizes:
    """The sizes of a published model."""
    from vlft.families.registry import FAMILIES

    family = next(family for family in FAMILIES if family.name == model.family)
    others = round(model.billions * 1e9) - language_params(model.llm) - lm_head_params(model.llm)
    return ModelSizes(model.llm, others, model.towers, family.attention_inputs)


def _folder_sizes(folder: ModelFolder) -> ModelSizes:
    """The sizes of a model folder, from its config and the headers of its weight files."""
    from vlft.checkpoints.weights import count_numbers

    try:
        params = count_numbers(folder.path)
    except CheckpointError:
        console.warn(f"{shown(folder.path)} holds no weights; towers and aligner are not counted")
        params = 0
    # The id of the image token changes no size.
    return model_sizes(folder.native_config(0), params, folder.family.attention_inputs)


def plan_data(config: PlanConfig, folder: ModelFolder) -> DataPlan:
    """Reads the data and plans the rows of the first epoch, as a run of one process would."""
    from vlft.families.image_settings import ImageSettings
    from vlft.training.samples import distinct_images, load_data, loop_options, make_planner

    processor = (
        ImageSettings.of(config)
        .apply(folder.processor())
        .with_special_tokens(config.special_tokens)
    )
    train, val = load_data(config, processor)
    planner = make_planner(config, processor, train, planned_device(config))
    steps = planner.schedule.steps_per_epoch
    planned = islice(planner.steps(), steps)
    packed, tokens, longest, rows = 0, 0, 0, 0
    for step in console.tracked(planned, "planning the rows of the first epoch", steps):
        packed += sum(row.tokens for row in step)
        tokens += sum(row.sample_tokens for row in step)
        longest, rows = max(longest, step[0].tokens), rows + len(step)
    images = [image for image in distinct_images((train, val)) if not image.drawn]
    return DataPlan(
        samples=planner.schedule.samples,
        validation=len(val),
        images=len(images),
        image_tokens=sum(image.tokens for image in images),
        tokens=tokens,
        packed_tokens=packed,
        longest_sample=int(train.lengths.max()),
        longest_row=longest,
        rows=rows,
        steps=steps,
        total_steps=loop_options(config, planner.schedule).total_steps,
        encoding=encoding_of(images, processor),
    )


def encoding_of(images: Sequence[EncodedImage], processor: Processor) -> Encoding | None:
    """What the encoding of these images holds at once; None if there are none."""
    from vlft.vision.batches import batches_ahead, cut_batches

    batches = cut_batches(images, processor)
    most: Counter[int] = Counter()
    for batch in batches:
        found: Counter[int] = Counter()
        for image in batch:
            for number, side in processor.pixels.sizes(image.tiles):
                found[side] += number
        most |= found
    views = tuple((number, side) for side, number in sorted(most.items()))
    return Encoding(views, min(len(batches), batches_ahead())) if views else None


def planned_device(config: PlanConfig) -> str:
    """What the run is planned for: a GPU unless the CPU is asked for, whatever is here."""
    return "cpu" if config.device == "cpu" else "cuda"


def row_tokens(config: PlanConfig, data: DataPlan | None = None, limit: int | None = None) -> int:
    """Tokens of the longest row: its limit, by default that of the settings, or what data gives."""
    limit = limit or config.tokens_per_microbatch or TOKENS_PER_ROW[planned_device(config)]
    return limit if data is None else max(data.longest_sample, min(data.longest_row, limit))


def memory_spec(config: PlanConfig, model: ModelSizes, data: DataPlan | None = None) -> MemorySpec:
    """The settings that memory depends on, every ``auto`` resolved as the run resolves it."""
    cuda = planned_device(config) == "cuda"
    float32 = config.dtype == "float32" or (config.dtype == "auto" and not cuda)
    spec = MemorySpec(
        weight_bytes=4 if float32 else 2,
        quantize=config.quantize,
        full=config.tuner == "full",
        targets=config.lora_target_modules,
        rank=config.lora_rank,
        checkpointing=bool(config.gradient_checkpointing),
        tokens=row_tokens(config, data),
        cached=config.vision_cache != "off" and not config.train_vision,
        cuda=cuda,
        encoding=data.encoding if data else None,
    )
    if config.gradient_checkpointing is not None or not cuda:
        return spec
    # The run leaves gradient checkpointing out if rows of ENOUGH_TOKENS fit, see training.autotune.
    shorter = row_tokens(config, data, config.tokens_per_microbatch or ENOUGH_TOKENS)
    for tokens in (spec.tokens, shorter):
        without = replace(spec, tokens=tokens)
        if estimate_memory(model, without).peak <= SAFE_SHARE * gpu_gib(config.gpu) * GIB:
            return without
    return replace(spec, checkpointing=True)
