"""Prompts -> images, for a model that draws."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlft.config import DrawConfig
from vlft.data.drawing import SYSTEM_PROMPT, with_start
from vlft.data.special_tokens import warn_of_special_tokens
from vlft.errors import ConfigError, DataError, raise_all
from vlft.inference.decoding import record_seed
from vlft.inference.generate import REPLIES
from vlft.inference.guided import Guidance, Order, draw_codes
from vlft.settings import convert

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from vlft.data.encode import EncodedSample
    from vlft.families.base import Family, ImageGenerator
    from vlft.families.processor import Processor


@dataclass(frozen=True)
class Drawing:
    """An image that the model drew.

    Attributes:
        codes: (K,) int64, of the image row by row.
    """

    codes: Tensor
    image: Image.Image


def draw(
    model: Any,
    processor: Processor,
    prompts: str | Sequence[str | Mapping[str, Any]],
    num_images: int = DrawConfig.num_images,
    cfg_weight: float = DrawConfig.cfg_weight,
    temperature: float = DrawConfig.temperature,
    seed: int = DrawConfig.seed,
    *,
    batch_size: int = DrawConfig.batch_size,
    image_root: str | Path | None = None,
) -> list[Drawing]:
    """Images of prompts: all of the first prompt, then all of the second, ...

    Args:
        model: of ``load``.
        processor: of ``load``.
        prompts: texts, or rows of the native layout, whose ``images`` the model sees.
        num_images: of each prompt.
        cfg_weight: of classifier-free guidance, https://arxiv.org/abs/2207.12598: scores without
            the prompt plus so many times what the prompt changes; 1 is no guidance.
        temperature: 0 takes the likeliest code.
        seed: of all draws; those of an image do not depend on the other images.
        batch_size: images drawn together.
        image_root: folder of relative image paths; the working folder if None.

    Raises:
        ConfigError: the model's family does not draw, or a setting is not allowed.
        DataError: a prompt cannot be used.
    """
    generator_of(processor.family)
    names = ("num_images", "cfg_weight", "temperature", "seed", "batch_size")
    given = (num_images, cfg_weight, temperature, seed, batch_size)
    raise_all(convert(DrawConfig, dict(zip(names, given, strict=True)))[1])
    rows = [prompts] if isinstance(prompts, str) else prompts
    encoded = [_encode(row, processor, image_root) for row in rows]
    warn_of_special_tokens([("", prompt.as_text) for prompt in encoded])
    guidance, drawn = Guidance(cfg_weight, temperature), list[Drawing]()
    for batch in cut_batches(len(encoded), num_images, batch_size):
        seeds = partial(image_seed, seed)
        orders = orders_of(batch, num_images, encoded.__getitem__, seeds)
        drawn += draw_batch(model, processor, orders, guidance)
    return drawn


def generator_of(family: Family) -> ImageGenerator:
    """How the models of a family draw.

    Raises:
        ConfigError: they do not.
    """
    if family.generator is None:
        hint = "use Janus-1.3B, Janus-Pro-1B or Janus-Pro-7B, or what was tuned from them"
        raise ConfigError(f"{family.title} does not draw images", place="vlft draw", hint=hint)
    return family.generator


def image_seed(seed: int, prompt: int, image: int) -> int:
    """The seed of an image's draws, which depends on no other image."""
    return record_seed(seed, (prompt, image))


def drawing_prompt(prompt: EncodedSample, processor: Processor, place: str = "") -> EncodedSample:
    """An encoded question with the tokens that begin an image.

    Raises:
        DataError: there is no room for the codes of an image.
    """
    started = with_start(prompt, processor.chat)
    most = processor.max_length - (processor.pixels.tokens or 0)
    if len(started) > most:
        found = f"a prompt of {len(started)} tokens, at most {most} are allowed for a drawing"
        raise DataError(found, place=place, hint="shorten it")
    return started


def cut_batches(prompts: int, num_images: int, size: int) -> list[range]:
    """The images of all prompts in batches: image i of prompt p is number p * num_images + i."""
    total = prompts * num_images
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def orders_of(
    batch: range,
    num_images: int,
    prompt_of: Callable[[int], EncodedSample],
    seed_of: Callable[[int, int], int],
) -> list[Order]:
    """The orders of a batch of ``cut_batches``.

    Args:
        batch: numbers of images.
        num_images: of each prompt.
        prompt_of: prompt -> encoded, see ``drawing_prompt``.
        seed_of: prompt, image of it -> seed.
    """
    groups = itertools.groupby(batch, lambda number: number // num_images)
    return [
        Order(prompt_of(prompt), [seed_of(prompt, number % num_images) for number in numbers])
        for prompt, numbers in groups
    ]


def draw_batch(
    model: Any,
    processor: Processor,
    orders: Sequence[Order],
    guidance: Guidance,
    progress: Callable[[], object] = lambda: None,
) -> list[Drawing]:
    """The images of all orders, drawn together; ``progress`` is called once per code."""
    whole: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    generator = generator_of(processor.family)
    with torch.inference_mode():
        codes = draw_codes(whole, processor, generator, orders, guidance, progress)
        # One at a time: the decoder takes far more memory than a step.
        images = [_as_image(generator.decode(whole, row.unsqueeze(0))[0]) for row in codes]
    return [Drawing(*pair) for pair in zip(codes.cpu(), images, strict=True)]


def _as_image(pixels: Tensor) -> Image.Image:
    """The image of (3, H, W) values from -1 to 1; as in the authors' code they are truncated."""
    values = ((pixels + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(values.permute(1, 2, 0).cpu().numpy()))


def _encode(
    row: str | Mapping[str, Any], processor: Processor, image_root: str | Path | None
) -> EncodedSample:
    """The prompt of a text or a row."""
    given = {"query": row} if isinstance(row, str) else dict(row)
    kept = {key: value for key, value in given.items() if key not in REPLIES}
    prompt = processor.encode({"system": SYSTEM_PROMPT, **kept}, image_root)
    return drawing_prompt(prompt, processor)
