"""``vlft draw``: images of prompts, by a checkpoint or a model."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vlft import __version__, console
from vlft.config import ReadingSettings
from vlft.data.conversation import flat_text
from vlft.data.dataset import load_dataset
from vlft.data.drawing import as_prompt
from vlft.data.image_notes import warn_of_images
from vlft.data.in_memory import keep_records
from vlft.data.layouts.place import COMMON_TAG
from vlft.data.options import DataOptions
from vlft.data.special_tokens import warn_of_special_tokens
from vlft.errors import ConfigError, explaining_memory, shown
from vlft.families.image_settings import ImageSettings
from vlft.files import digest
from vlft.inference.data import validation_set
from vlft.inference.draw import (
    cut_batches,
    draw_batch,
    drawing_prompt,
    generator_of,
    image_seed,
    orders_of,
)
from vlft.inference.guided import Guidance
from vlft.inference.image_files import ImageFiles
from vlft.inference.model import find_model, load_for_inference, placement_of
from vlft.inference.reconstruct import report
from vlft.settings import check

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vlft.checkpoints.locate import ModelFolder
    from vlft.checkpoints.placement import Placement
    from vlft.checkpoints.tuned import Tuned
    from vlft.config import DrawConfig
    from vlft.data.conversation import Conversation
    from vlft.data.dataset import Dataset
    from vlft.data.encode import EncodedSample
    from vlft.families.processor import Processor

# What makes drawing take less memory.
SMALLER = "lower --batch-size, or use --quantize nf4 or --dtype bfloat16"


@dataclass(frozen=True)
class DrawResult:
    """The images of a command, prompt by prompt, and the sheets that show all of them."""

    images: list[Path]
    sheets: list[Path]


def run_draw(config: DrawConfig) -> DrawResult:
    """Draws images of prompts into files; those that are there already are kept.

    Or, with ``reconstruct``, tells how much the codes of images keep, and draws none.

    Raises:
        VlftError: bad input.
    """
    config = check(config)
    tuned, folder = find_model(config)
    processor = folder.processor()
    generator_of(processor.family)
    if tuned is not None:
        processor = ImageSettings.of(tuned.settings).apply(processor, tuned.settings_file)
        processor = processor.with_special_tokens(tuned.settings.special_tokens)
    placement = placement_of(config, tuned)
    if config.reconstruct:
        model = load_for_inference(config, folder, tuned, placement)
        smaller = "use --dtype bfloat16, or --device cpu"
        with explaining_memory("while images are encoded and decoded", smaller):
            report(model, processor, config.reconstruct)
        return DrawResult([], [])
    data = _read_prompts(config, tuned, processor)
    shared = _facts(config, folder, tuned, placement)
    files = ImageFiles(
        config.output_dir,
        len(data),
        config.num_images,
        lambda prompt, image: {**shared, **_facts_of(data.conversations[prompt]), "image": image},
        overwrite=config.overwrite,
    )
    with files.held():
        missing = files.find_missing()
        total = len(data) * config.num_images
        if len(missing) < total:
            console.info(
                f"{shown(files.folder)} holds {total - len(missing)} of {total} images already"
            )
        if missing:
            model = load_for_inference(config, folder, tuned, placement)
            _draw(model, processor, data, files, missing, config)
        sheets = files.write_sheets()
        files.write_list(lambda prompt: _row_of(data.conversations[prompt]))
    console.info(f"{_images(total)} in {shown(files.folder)}, shown on {sheets[0].name}")
    return DrawResult([files.path(number) for number in range(total)], sheets)


def _read_prompts(config: DrawConfig, tuned: Tuned | None, processor: Processor) -> Dataset:
    """The records to draw, in the order of their images."""
    options = DataOptions(
        reading=processor.reading(ReadingSettings(), need_response=False),
        image_root=config.image_root,
        confine_images=config.confine_images,
        allow_private_urls=config.allow_private_urls,
        rotate=processor.pixels.rotate,
        on_bad_sample=config.on_bad_sample,
        max_length=processor.max_length - (processor.pixels.tokens or 0) - 1,
        seed=config.seed,
        expects_images=False,
    )
    if config.load_dataset_config and tuned is not None:
        return _drawings(validation_set(config, tuned, processor, options))
    files: Sequence[str] = config.dataset
    if config.prompt:
        blank = [text for text in config.prompt if not text.strip()]
        if blank:
            hint = "write what to draw, e.g. --prompt 'a red square'"
            raise ConfigError(f"found {blank[0]!r}", place="--prompt", hint=hint)
        files = [keep_records([{"query": text} for text in config.prompt])]
    data = load_dataset(files, processor.encoder, options)
    warn_of_images(data.with_notes())
    warn_of_special_tokens(data.as_text)
    return data


def _drawings(data: Dataset) -> Dataset:
    """The records whose reply is an image.

    Raises:
        ConfigError: there is none.
    """
    rest, drawings = data.divide(np.flatnonzero(data.is_drawn).tolist())
    if not len(drawings):
        found, hint = "no reply of the validation set is an image", "vlft infer answers with text"
        raise ConfigError(found, place="--load-dataset-config", hint=hint)
    if len(rest):
        console.warn(
            f"{len(rest)} records whose reply is text are left out; vlft infer answers such"
        )
    return drawings


@explaining_memory("while images are drawn", SMALLER)
def _draw(
    model: Any,
    processor: Processor,
    data: Dataset,
    files: ImageFiles,
    missing: set[int],
    config: DrawConfig,
) -> None:
    """Draws the missing images.

    A batch with a missing image is drawn as a whole: in another batch the last bits of scores may
    differ, and with them a code.
    """
    batches = cut_batches(len(data), config.num_images, config.batch_size)
    wanted = [batch for batch in batches if not missing.isdisjoint(batch)]
    guidance = Guidance(config.cfg_weight, config.temperature)
    codes = len(wanted) * (processor.pixels.tokens or 0)
    steps = console.tracked(itertools.repeat(None, codes), "drawing", codes)
    begin = time.perf_counter()
    for batch in wanted:
        orders = orders_of(
            batch,
            config.num_images,
            lambda number: _encode(data.conversations[number], processor),
            partial(_seed, data, config.seed),
        )
        drawn = draw_batch(model, processor, orders, guidance, partial(next, steps, None))
        for number, drawing in zip(batch, drawn, strict=True):
            if number in missing:
                files.save(number, drawing.image)
    next(steps, None)
    seconds = time.perf_counter() - begin
    console.info(f"{_images(len(missing))} drawn in {seconds:,.0f} s")


def _encode(conversation: Conversation, processor: Processor) -> EncodedSample:
    return drawing_prompt(
        processor.encode_conversation(as_prompt(conversation)), processor, conversation.place
    )


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def _seed(data: Dataset, seed: int, prompt: int, image: int) -> int:
    """The seed of an image: of its record in its file, wherever that stands among the prompts."""
    file, record = data.positions[prompt]
    return image_seed(seed, (file << 32) + record, image)


def _facts(
    config: DrawConfig, folder: ModelFolder, tuned: Tuned | None, placement: Placement
) -> dict[str, Any]:
    """What all images of a command are drawn with."""
    adapter = tuned.adapter if tuned else None
    files = sorted(adapter.glob("adapter_*")) if adapter else []
    return {
        "vlft": __version__,
        "cfg_weight": config.cfg_weight,
        "temperature": config.temperature,
        "seed": config.seed,
        "dtype": str(placement.dtype).removeprefix("torch."),
        "quantize": placement.quantize,
        "merge_lora": config.merge_lora,
        "model": folder.weights_digest,
        "adapter": {path.name: digest(path) for path in files},
    }


def _row_of(conversation: Conversation) -> dict[str, Any]:
    """What the list of images says of a prompt; the label is the image that a record has."""
    prompt = conversation.without_reply()
    target = conversation.drawn
    return {
        "query": flat_text(prompt.turns[-1], COMMON_TAG),
        "images": [str(image.path) for image in prompt.images],
        "label": None if target is None else str(target.path),
    }


def _facts_of(conversation: Conversation) -> dict[str, Any]:
    """What the images of a prompt are drawn from."""
    prompt = conversation.without_reply()
    return {
        "prompt": [flat_text(turn, COMMON_TAG) for turn in prompt.turns],
        "system": prompt.system,
        "images": [image.facts.digest for image in prompt.images if image.facts],
    }
