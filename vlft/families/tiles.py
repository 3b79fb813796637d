"""Dynamic tiling of DeepSeek-VL2: the whole image, and tiles of the tower's input size."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from PIL import ImageOps

from vlft.errors import ConfigError
from vlft.families.base import Pixels
from vlft.families.pixels import normalised

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image
    from torch import Tensor

    from vlft.data.encode import Tiles

# With so many images in a conversation, or more, none is cut into tiles.
NO_TILES_FROM = 3


@dataclass(frozen=True)
class Tiling:
    """How an image becomes views.

    Attributes:
        size: height and width of a view, in pixels.
        candidates: (width, height) of the allowed grids of tiles, in pixels.
        side: a view becomes a grid of side x side tokens.
        mean: of each channel, as ``std``; also the colour of the border.
        normalise: whether mean and std are applied.
    """

    size: int
    candidates: tuple[tuple[int, int], ...]
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalise: bool = True

    def tokens(self, tiles: Tiles) -> int:
        """Tokens of an image: whole view, separator, all tiles as one grid; a newline per row."""
        across, down = tiles
        return self.side * (self.side + 1) + 1 + down * self.side * (across * self.side + 1)


def tiled_pixels(tiling: Tiling, stated: Mapping[str, Mapping[str, Any]] | None = None) -> Pixels:
    """The whole view of each image, then its tiles; ``stated`` as in Pixels."""

    def view(size: tuple[int, int], count: int) -> tuple[int, Tiles]:
        tiles = _best_grid(size, tiling) if count < NO_TILES_FROM else (1, 1)
        return tiling.tokens(tiles), tiles

    return Pixels(
        tokens=None,
        view=view,
        sizes=lambda tiles: ((1 + prod(tiles), tiling.size),),
        rows=lambda tiles: 1 + prod(tiles),
        transform=lambda image, tiles: (_cut(image, tiles, tiling),),
        inputs=lambda views, tiles: {
            "pixel_values": torch.cat([of_image for (of_image,) in views]),
            "tiles": torch.tensor(tiles),
        },
        fingerprint=repr(asdict(tiling)),
        limit=lambda tiles, tokens: _limited(tiling, tiles, tokens),
        stated=stated or {},
    )


def _limited(tiling: Tiling, most_tiles: int | None, most_tokens: int | None) -> Pixels:
    """The pixels with those grids alone that have at most so many tiles and tokens."""
    size = tiling.size
    grids = {(w, h): (w // size, h // size) for w, h in tiling.candidates}
    kept = tuple(
        candidate
        for candidate, (across, down) in grids.items()
        if (most_tiles is None or across * down <= most_tiles)
        and (most_tokens is None or tiling.tokens((across, down)) <= most_tokens)
    )
    if not kept:
        tiles = min(across * down for across, down in grids.values())
        tokens = min(map(tiling.tokens, grids.values()))
        raise ConfigError(
            f"too low for this model: an image has at least {tokens} tokens, {tiles} tile(s)",
            place="--max-image-tokens" if most_tokens else "--max-tiles",
            hint="raise it",
        )
    entries = {"candidate_resolutions": [list(candidate) for candidate in kept]}
    stated = {"processor_config.json": entries, "config.json": entries}
    return tiled_pixels(replace(tiling, candidates=kept), stated)


def _best_grid(image: tuple[int, int], tiling: Tiling) -> Tiles:
    """The grid of tiles that keeps the most pixels of an image and, among equals, adds the fewest.

    The image is (width, height) in pixels, the grid (across, down) in tiles.
    """
    width, height = image

    def fitness(candidate: tuple[int, int]) -> tuple[int, int]:
        scale = min(candidate[0] / width, candidate[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - candidate[0] * candidate[1]

    # Among equals max() takes the first, as the authors' code does.
    best = max(tiling.candidates, key=fitness)
    return best[0] // tiling.size, best[1] // tiling.size


def _cut(image: Image, tiles: Tiles, tiling: Tiling) -> Tensor:
    """(1 + across * down, 3, H, W) float32: the whole image, then its tiles row by row."""
    size = tiling.size
    across, down = tiles
    border = tuple(int(value * 255) for value in tiling.mean)
    whole = ImageOps.pad(image, (size, size), color=border)
    large = ImageOps.pad(image, (across * size, down * size), color=border)
    views = [whole, *split(large, tiles, size)]
    values = torch.stack([to_floats(view) for view in views])
    return normalised(values, tiling.mean, tiling.std) if tiling.normalise else values


def split(image: Image, tiles: Tiles, size: int) -> list[Image]:
    """The tiles of an image, row by row."""
    across, down = tiles
    return [
        image.crop((x * size, y * size, (x + 1) * size, (y + 1) * size))
        for y in range(down)
        for x in range(across)
    ]


def to_floats(image: Image) -> Tensor:
    """(3, H, W) float32 from 0 to 1."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).permute(2, 0, 1).float().div(255)
