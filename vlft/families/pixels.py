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
from vlft.files import read_object

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
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
    path = folder / PREPROCESSOR_FILE
    stated = read_object(path) if path.is_file() else {}
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

    def transform(image: Image.Image, tiles: Tiles) -> Tensor:  # noqa: ARG001
        return to_square(image, settings).unsqueeze(0)

    def inputs(views: Tensor, tiles: Sequence[Tiles]) -> dict[str, Tensor]:  # noqa: ARG001
        return {"pixel_values": views}

    view = fixed_view(tokens)
    return Pixels(tokens, settings.size, view, transform, inputs, repr(asdict(settings)))


def fixed_view(tokens: int) -> Callable[[tuple[int, int], int], View]:
    """A ``Pixels.view`` that gives every image the same number of tokens."""
    return lambda size, count: View(tokens)  # noqa: ARG005


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


def to_square(image: Image.Image, settings: SquareSettings) -> Tensor:
    """(3, S, S) float32 pixel values of an RGB image."""
    background = tuple(int(value * 255) for value in settings.mean)
    square = _resize_and_pad(image, settings.size, settings.min_size, background)  # type: ignore[arg-type]
    mean, std = (settings.mean, settings.std) if settings.normalise else (None, None)
    return _to_pixel_values(square, settings.rescale, mean, std)


def _resize_and_pad(
    image: Image.Image, size: int, min_size: int, background: tuple[int, int, int]
) -> Image.Image:
    """The image with its longer side at ``size`` pixels, centred on a square of that size.

    Its shorter side is truncated, not rounded, and at least ``min_size`` pixels.
    """
    longest = max(image.size)
    width, height = (max(int(side / longest * size), min_size) for side in image.size)
    if min(image.size) <= 0:
        raise ValueError(f"an image of {image.size} pixels")
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (size, size), background)
    canvas.paste(resized, ((size - width) // 2, (size - height) // 2))
    return canvas


def _to_pixel_values(
    image: Image.Image,
    rescale: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Tensor:
    """(3, H, W) float32: bytes times ``rescale``, then normalised by channel if a mean is given.

    The product is computed in float64 and rounded once, as numpy does in the authors' code.
    """
    values = (np.asarray(image, dtype=np.uint8) * np.float64(rescale)).astype(np.float32)
    if mean is not None and std is not None:
        values -= np.asarray(mean, np.float32)
        values /= np.asarray(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def downscaled(pixels: Tensor, size: int) -> Tensor:
    """(I, 3, size, size) of (I, 3, H, W): bilinear with antialiasing, not rounded to bytes."""
    return F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=True)


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(I, 3, H, W) minus the mean of each channel, divided by its standard deviation."""
    shape = (1, 3, 1, 1)
    return (pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
