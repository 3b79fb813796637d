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
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

HALF = (0.5, 0.5, 0.5)
FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class Numbers:
    """The settings of the processor.

    Attributes:
        size: pixels of a side of the square.
        min_size: least pixels of the image's shorter side.
        mean: of each channel; also the colour of the border.
        std: of each channel.
        rescale: factor from bytes.
        normalise: whether mean and std are applied here; else the model's towers do it.
    """

    size: int
    min_size: int = 14
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    rescale: float = 0.00392156862745098
    normalise: bool = True


def read_numbers(
    folder: Path, size: int, *, mean: Sequence[float] = HALF, normalise: bool = True
) -> Numbers:
    """The numbers of preprocessor_config.json.

    The background colour is computed from the mean; the file's is ignored, as the authors do.

    Args:
        folder: of the model.
        size: of the tower; the file's is not asked.
        mean: where the file has none.
        normalise: likewise.
    """
    path = folder / FILE
    stated = read_object(path) if path.is_file() else {}
    stated = {key: value for key, value in stated.items() if value is not None}
    return Numbers(
        size,
        stated.get("min_size", 14),
        tuple(stated.get("image_mean", mean)),
        tuple(stated.get("image_std", HALF)),
        stated.get("rescale_factor", 0.00392156862745098),
        stated.get("do_normalize", normalise),
    )


def square_pixels(numbers: Numbers, tokens: int) -> Pixels:
    """One square view of each image, all of the same number of tokens."""

    def transform(image: Image.Image, tiles: Tiles) -> Tensor:  # noqa: ARG001
        return to_square(image, numbers).unsqueeze(0)

    def inputs(views: Tensor, tiles: Sequence[Tiles]) -> dict[str, Tensor]:  # noqa: ARG001
        return {"pixel_values": views}

    view = fixed_view(tokens)
    return Pixels(tokens, numbers.size, view, transform, inputs, repr(asdict(numbers)))


def fixed_view(tokens: int) -> Any:
    """Every image becomes the same number of tokens."""
    return lambda size, count: View(tokens)  # noqa: ARG005


def preprocessor(numbers: Numbers) -> dict[str, Any]:
    """The fields of preprocessor_config.json that both layouts share."""
    return {
        "min_size": numbers.min_size,
        "image_mean": list(numbers.mean),
        "image_std": list(numbers.std),
        "do_normalize": numbers.normalise,
        "rescale_factor": numbers.rescale,
    }


def square_files(
    numbers: Numbers, tokens: int, layout: str, *, image_tag: str, native: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """preprocessor_config.json and processor_config.json of a layout.

    Args:
        numbers: of the processor.
        tokens: of each image.
        layout: original or transformers.
        image_tag: of the family.
        native: the name before ``Processor`` and ``ImageProcessor`` of transformers' classes.
    """
    if layout == "original":
        return {
            **preprocessor(numbers),
            "image_processor_type": "VLMImageProcessor",
            "image_size": numbers.size,
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
        **preprocessor(numbers),
        "image_processor_type": f"{native}ImageProcessor",
        "processor_class": f"{native}Processor",
        "size": {"height": numbers.size, "width": numbers.size},
    }, {"processor_class": f"{native}Processor", "num_image_tokens": tokens}


def to_square(image: Image.Image, numbers: Numbers) -> Tensor:
    """(3, S, S) float32 of an RGB image."""
    background = tuple(int(value * 255) for value in numbers.mean)
    square = resize_and_pad(image, numbers.size, numbers.min_size, background)  # type: ignore[arg-type]
    mean, std = (numbers.mean, numbers.std) if numbers.normalise else (None, None)
    return to_pixel_values(square, numbers.rescale, mean, std)


def resize_and_pad(
    image: Image.Image, size: int, min_size: int, background: tuple[int, int, int]
) -> Image.Image:
    """The image with its longer side at ``size`` pixels, centred on a square of that size.

    The shorter side is truncated, not rounded, and is at least ``min_size``.
    """
    longest = max(image.size)
    width, height = (max(int(side / longest * size), min_size) for side in image.size)
    if min(image.size) <= 0:
        raise ValueError(f"an image of {image.size} pixels")
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (size, size), background)
    canvas.paste(resized, ((size - width) // 2, (size - height) // 2))
    return canvas


def to_pixel_values(
    image: Image.Image,
    rescale: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Tensor:
    """(3, H, W) float32: bytes times ``rescale``, then normalised by channel if a mean is given.

    The product is taken in double precision and rounded once, as numpy does it for the authors.
    """
    values = (np.asarray(image, dtype=np.uint8) * np.float64(rescale)).astype(np.float32)
    if mean is not None and std is not None:
        values -= np.asarray(mean, np.float32)
        values /= np.asarray(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def shrunk(pixels: Tensor, size: int) -> Tensor:
    """(I, 3, size, size) of (I, 3, H, W), bilinear with antialiasing, in floats."""
    return F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=True)


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(I, 3, H, W) less the mean of each channel, over its standard deviation."""
    shape = (1, 3, 1, 1)
    return (pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
