"""The authors' image processor of DeepSeek-VL and Janus: resize, pad, rescale, normalise."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from vlft.data.encode import View
from vlft.families.base import Pixels, Tiles
from vlft.files import read_object_if_there

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

HALF = (0.5, 0.5, 0.5)
PREPROCESSOR_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class SquareSettings:
    """How an image becomes a padded square.

    Attributes:
        size: height and width of the square, in pixels.
        min_size: minimum of the shorter side of the image in it, in pixels.
        mean: of each channel; also the colour of the border.
        std: of each channel.
        rescale: factor from bytes to floats.
        normalise: whether mean and std are applied to the square; else it happens per tower.
    """

    size: int
    min_size: int = 14
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    rescale: float = 0.00392156862745098
    normalise: bool = True


def read_settings(
    folder: Path, size: int, *, mean: Sequence[float] = HALF, normalise: bool = True
) -> SquareSettings:
    """The settings in preprocessor_config.json.

    As in the authors' code, the border has the colour of the mean; the file's own is ignored.

    Args:
        folder: of the model.
        size: input size of the tower, which is used instead of the file's image_size.
        mean: default, if the file has none.
        normalise: default, if the file does not say.
    """
    stated = read_object_if_there(folder / PREPROCESSOR_FILE)
    stated = {key: value for key, value in stated.items() if value is not None}
    return SquareSettings(
        size,
        stated.get("min_size", 14),
        tuple(stated.get("image_mean", mean)),
        tuple(stated.get("image_std", HALF)),
        stated.get("rescale_factor", 0.00392156862745098),
        stated.get("do_normalize", normalise),
    )


def square_pixels(settings: SquareSettings, tokens: int) -> Pixels:
    """One square view per image, of always the same number of tokens."""

    def view(size: tuple[int, int], count: int) -> View:  # noqa: ARG001
        return View(tokens)

    def transform(image: Image.Image, tiles: Tiles) -> Tensor:  # noqa: ARG001
        return _square(image, settings).unsqueeze(0)

    def inputs(views: Tensor, tiles: Sequence[Tiles]) -> dict[str, Tensor]:  # noqa: ARG001
        return {"pixel_values": views}

    return Pixels(tokens, settings.size, view, transform, inputs, repr(asdict(settings)))


def _shared_fields(settings: SquareSettings) -> dict[str, Any]:
    """The fields of preprocessor_config.json that are the same in both layouts."""
    return {
        "min_size": settings.min_size,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
        "do_normalize": settings.normalise,
        "rescale_factor": settings.rescale,
    }


def square_files(
    settings: SquareSettings, tokens: int, layout: str, *, image_tag: str, native: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """preprocessor_config.json and processor_config.json of a layout.

    Args:
        settings: of the square.
        tokens: image tokens per image.
        layout: original or transformers.
        image_tag: of the family.
        native: prefix of the names of transformers' ``Processor`` and ``ImageProcessor`` classes.
    """
    if layout == "original":
        return {
            **_shared_fields(settings),
            "image_processor_type": "VLMImageProcessor",
            "image_size": settings.size,
            "processor_class": "VLChatProcessor",
        }, {
            "add_special_token": False,
            "ignore_id": -100,
            "image_tag": image_tag,
            "mask_prompt": True,
            "num_image_tokens": tokens,
            "processor_class": "VLChatProcessor",
            "sft_format": "deepseek",
        }
    return {
        **_shared_fields(settings),
        "image_processor_type": f"{native}ImageProcessor",
        "processor_class": f"{native}Processor",
        "size": {"height": settings.size, "width": settings.size},
    }, {"processor_class": f"{native}Processor", "num_image_tokens": tokens}


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


def downscaled(pixels: Tensor, size: int) -> Tensor:
    """(I, 3, size, size) of (I, 3, H, W): bilinear with antialiasing, not rounded to bytes."""
    return F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=True)


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(I, 3, H, W) minus the mean of each channel, divided by its standard deviation."""
    shape = (1, 3, 1, 1)
    return (pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
