"""The authors' image processor of DeepSeek-VL and Janus: resize, pad, rescale, normalise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def resize_and_pad(
    picture: Image.Image, size: int, min_size: int, background: tuple[int, int, int]
) -> Image.Image:
    """The picture with its longer side at ``size`` pixels, centred on a square of that size.

    The shorter side is truncated, not rounded, and is at least ``min_size``.
    """
    longest = max(picture.size)
    width, height = (max(int(side / longest * size), min_size) for side in picture.size)
    if min(picture.size) <= 0:
        raise ValueError(f"a picture of {picture.size} pixels")
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (size, size), background)
    canvas.paste(resized, ((size - width) // 2, (size - height) // 2))
    return canvas


def to_pixel_values(
    picture: Image.Image,
    rescale: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Tensor:
    """(3, H, W) float32: bytes times ``rescale``, then normalised by channel if a mean is given.

    The product is taken in double precision and rounded once, as numpy does it for the authors.
    """
    values = (np.asarray(picture, dtype=np.uint8) * np.float64(rescale)).astype(np.float32)
    if mean is not None and std is not None:
        values -= np.asarray(mean, np.float32)
        values /= np.asarray(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))
