"""Dynamic tiling of DeepSeek-VL2: an image whole, and cut into tiles of the tower's size."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from PIL import ImageOps

from vlft.data.encode import View
from vlft.families.base import Pixels, Tiles
from vlft.families.pixels import normalised

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from torch import Tensor

# Images of a conversation from which on none is cut.
UNCUT_FROM = 3


@dataclass(frozen=True)
class Tiling:
    """The settings of the processor.

    Attributes:
        size: pixels of a side of the tower's view.
        candidates: (width, height) of the images that tiles may make up, in pixels.
        side: tokens of a side of a view.
        mean: of each channel; also the colour of the border.
        std: of each channel.
        normalise: whether they are applied.
    """

    size: int
    candidates: tuple[tuple[int, int], ...]
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalise: bool = True

    def tokens(self, tiles: Tiles) -> int:
        """Of an image: rows of the whole view, a separator, rows of all tiles as one grid."""
        across, down = tiles
        return self.side * (self.side + 1) + 1 + down * self.side * (across * self.side + 1)


def tiled_pixels(tiling: Tiling) -> Pixels:
    """The views of each image, the whole one first."""

    def view(size: tuple[int, int], count: int) -> View:
        tiles = best_grid(size, tiling) if count < UNCUT_FROM else (1, 1)
        return View(tiling.tokens(tiles), tiles)

    def transform(image: Image, tiles: Tiles) -> Tensor:
        return cut_up(image, tiles, tiling)

    def inputs(views: Tensor, tiles: Sequence[Tiles]) -> dict[str, Tensor]:
        return {"pixel_values": views, "tiles": torch.tensor(tiles)}

    return Pixels(None, tiling.size, view, transform, inputs, repr(asdict(tiling)))


def best_grid(image: tuple[int, int], tiling: Tiling) -> Tiles:
    """The grid of tiles that keeps most of an image's pixels and adds fewest.

    Args:
        image: (width, height) in pixels.
        tiling: with the candidates.

    Returns:
        (across, down).
    """
    width, height = image

    def fitness(candidate: tuple[int, int]) -> tuple[int, int]:
        scale = min(candidate[0] / width, candidate[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - candidate[0] * candidate[1]

    # Of equals the first.
    best = max(tiling.candidates, key=fitness)
    return best[0] // tiling.size, best[1] // tiling.size


def cut_up(image: Image, tiles: Tiles, tiling: Tiling) -> Tensor:
    """(1 + across * down, 3, H, W) float32: the whole image, then its tiles row by row."""
    size = tiling.size
    across, down = tiles
    border = tuple(int(value * 255) for value in tiling.mean)
    whole = ImageOps.pad(image, (size, size), color=border)
    large = ImageOps.pad(image, (across * size, down * size), color=border)
    views = [whole] + [
        large.crop((x * size, y * size, (x + 1) * size, (y + 1) * size))
        for y in range(down)
        for x in range(across)
    ]
    values = torch.stack([_to_floats(view) for view in views])
    return normalised(values, tiling.mean, tiling.std) if tiling.normalise else values


def _to_floats(image: Image) -> Tensor:
    """(3, H, W) float32 from 0 to 1."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).permute(2, 0, 1).float().div(255)
