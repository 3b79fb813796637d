"""The authors' image processor of DeepSeek-VL and Janus: resize, pad, rescale, normalise."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from vlft.families.base import PREPROCESSOR_FILE, PROCESSOR_FILE, Files, Pixels
from vlft.families.multi_modality import IMAGE_TAG
from vlft.families.schemas import PROCESSOR
from vlft.files import read_object_if_there

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

HALF = (0.5, 0.5, 0.5)
# A key of a small file that vlft alone writes and reads: the setting --exif of the training.
EXIF = "exif"


@dataclass(frozen=True)
class SquareSettings:
    """How an image becomes a padded square.

    Attributes:
        size: height and width of the square, in pixels.
        min_size: minimum of the shorter side of the image in it, in pixels.
        mean: of each channel, as ``std``; also the colour of the border.
        rescale: factor from bytes to floats.
        normalise: whether mean and std are applied to the square; else it happens per tower.
    """

    size: int
    min_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float
    normalise: bool


def read_settings(
    folder: Path, size: int, *, mean: Sequence[float] = HALF, normalise: bool = True
) -> SquareSettings:
    """The settings in preprocessor_config.json; ``mean`` and ``normalise`` are their defaults.

    As in the authors' code, the border has the colour of the mean and the square the size of the
    tower's input; what the file says of both is ignored.
    """
    stated = read_object_if_there(folder / PREPROCESSOR_FILE, PROCESSOR)
    stated = {key: value for key, value in stated.items() if value is not None}
    return SquareSettings(
        size,
        stated.get("min_size", 14),
        tuple(stated.get("image_mean", mean)),
        tuple(stated.get("image_std", HALF)),
        stated.get("rescale_factor", 0.00392156862745098),
        stated.get("do_normalize", normalise),
    )


def stated_exif(folder: Path) -> bool:
    """Whether the files of a model say that images are turned by their EXIF orientation."""
    names = (PREPROCESSOR_FILE, PROCESSOR_FILE)
    return any(
        read_object_if_there(folder / name, PROCESSOR).get(EXIF) == "rotate" for name in names
    )


def square_pixels(settings: SquareSettings, tokens: int, native: str) -> Pixels:
    """One square view per image, of always the same number of tokens.

    ``native`` is the prefix of transformers' ``Processor`` and ``ImageProcessor`` classes.
    """
    return Pixels(
        tokens=tokens,
        view=lambda _size, _count: (tokens, (0, 0)),
        sizes=lambda _tiles: ((1, settings.size),),
        rows=lambda _tiles: 1,
        transform=lambda image, _tiles: (_square(image, settings).unsqueeze(0),),
        inputs=lambda views, _tiles: {"pixel_values": torch.cat([square for (square,) in views])},
        fingerprint=repr(asdict(settings)),
        files=_files(settings, tokens, native),
    )


def _files(settings: SquareSettings, tokens: int, native: str) -> dict[str, Files]:
    """preprocessor_config.json and processor_config.json of both layouts."""
    shared = {
        "min_size": settings.min_size,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
        "do_normalize": settings.normalise,
        "rescale_factor": settings.rescale,
    }
    original = {
        **shared,
        "image_processor_type": "VLMImageProcessor",
        "image_size": settings.size,
        "processor_class": "VLChatProcessor",
    }
    original_chat = {
        "add_special_token": False,
        "ignore_id": -100,
        "image_tag": IMAGE_TAG,
        "mask_prompt": True,
        "num_image_tokens": tokens,
        "processor_class": "VLChatProcessor",
        "sft_format": "deepseek",
    }
    transformers = {
        **shared,
        "image_processor_type": f"{native}ImageProcessor",
        "processor_class": f"{native}Processor",
        "size": {"height": settings.size, "width": settings.size},
    }
    transformers_chat = {"processor_class": f"{native}Processor", "num_image_tokens": tokens}
    return {
        "original": {PREPROCESSOR_FILE: original, PROCESSOR_FILE: original_chat},
        "transformers": {PREPROCESSOR_FILE: transformers, PROCESSOR_FILE: transformers_chat},
    }


def _square(image: Image.Image, settings: SquareSettings) -> Tensor:
    """(3, S, S) float32 pixel values of an RGB image, centred on a square of the mean colour.

    The shorter side is truncated, not rounded. The product with ``rescale`` is computed in float64
    and rounded once, as numpy does in the authors' code.
    """
    size, longest = settings.size, max(image.size)
    width, height = (max(int(side / longest * size), settings.min_size) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    background = tuple(int(value * 255) for value in settings.mean)
    canvas = Image.new("RGB", (size, size), background)
    canvas.paste(resized, ((size - width) // 2, (size - height) // 2))
    values = np.asarray(canvas, dtype=np.uint8) * np.float64(settings.rescale)
    values = values.astype(np.float32)
    if settings.normalise:
        values -= np.asarray(settings.mean, np.float32)
        values /= np.asarray(settings.std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(I, 3, H, W) minus the mean of each channel, divided by its standard deviation."""
    shape = (1, 3, 1, 1)
    return (pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
