"""How much of an image its codes keep: encoded, decoded again, and compared.

image -> the square that the model sees -> codes -> decoded square; PSNR and SSIM of both squares
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlft import console
from vlft.data.images import decoded
from vlft.errors import shown
from vlft.inference.draw import generator_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlft.families.processor import Processor

# Of SSIM: side and deviation of its window in pixels, and its constants for bytes.
WINDOW, DEVIATION = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


class Fidelity(NamedTuple):
    """How alike two images are.

    Attributes:
        psnr: peak signal-to-noise ratio in decibel; infinite for equal images.
        ssim: structural similarity, 1 for equal images.
    """

    psnr: float
    ssim: float


def reconstruct(model: Any, processor: Processor, path: str | Path) -> Fidelity:
    """How alike an image and its reconstruction are, as bytes.

    Raises:
        ConfigError: the model's family does not draw.
        DataError: the file is missing, or no image.
    """
    generator = generator_of(processor.family)
    with decoded(Path(path), rotate=processor.pixels.rotate) as rgb:
        (square,) = processor.pixels.transform(rgb, (0, 0))
    square = square.to(next(model.parameters()).device)
    with torch.inference_mode():
        found = generator.decode(model, generator.encode(model, square))
    one, other = (_as_bytes(pixels) for pixels in (square, found))
    return Fidelity(psnr(one, other), ssim(one, other))


def report(model: Any, processor: Processor, paths: Sequence[str]) -> None:
    """Prints the figures of some images, and their means."""
    width = max(len(shown(path)) for path in (*paths, "mean"))
    found = [reconstruct(model, processor, path) for path in paths]
    means = Fidelity(*(sum(values) / len(found) for values in zip(*found, strict=True)))
    for name, one in [*zip(map(shown, paths), found, strict=True), ("mean", means)]:
        line = f"{name:{width}}  PSNR {one.psnr:5.2f} dB  SSIM {one.ssim:.4f}"
        console.out.print(line, markup=False, highlight=False, soft_wrap=True)


def psnr(one: Tensor, other: Tensor) -> float:
    """In decibel, of images (1, 3, H, W) from 0 to 255."""
    error = float((one - other).square().mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(one: Tensor, other: Tensor) -> float:
    """Mean over windows and channels of images (1, 3, H, W) from 0 to 255.

    Wang et al. 2004, equation 13, with their Gaussian window; windows that leave the image do not
    count.
    """
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=one.device) - WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * DEVIATION**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    x, y = (image.double().transpose(0, 1) for image in (one, other))  # (3, 1, H, W)
    mean_x, mean_y = F.conv2d(x, window), F.conv2d(y, window)
    of_x, of_y = F.conv2d(x * x, window) - mean_x**2, F.conv2d(y * y, window) - mean_y**2
    of_both = F.conv2d(x * y, window) - mean_x * mean_y
    above = (2 * mean_x * mean_y + C1) * (2 * of_both + C2)
    below = (mean_x**2 + mean_y**2 + C1) * (of_x + of_y + C2)
    return float((above / below).mean())


def _as_bytes(pixels: Tensor) -> Tensor:
    """Values from 0 to 255 of pixels from -1 to 1, truncated as those of a drawing."""
    # Rounding leaves some bytes of the original a little below their value; without the small
    # addition they would be truncated to the next lower one.
    return ((pixels.float() + 1) / 2 * 255 + 1e-3).clamp(0, 255).floor()
