"""The views of a page, for DeepSeek-OCR and DeepSeek-OCR-2: the whole, and in a mode its tiles."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from PIL import ImageOps

from vlft.errors import ConfigError
from vlft.families.base import PREPROCESSOR_FILE, PROCESSOR_FILE, Files, Pixels, Views
from vlft.families.pixels import HALF, normalised
from vlft.families.schemas import PROCESSOR
from vlft.families.tiles import split, to_floats
from vlft.files import read_object_if_there

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor

    from vlft.data.encode import Tiles

IMAGE_TAG, PAD = "<image>", "<｜▁pad▁｜>"
BORDER = (127, 127, 127)
# Pixels of an image along one token: 16 of SAM's patches, and two convolutions of stride 2.
TOKEN_PIXELS = 64
NO_TILES = (0, 0)


@dataclass(frozen=True)
class ImageMode:
    """How a page becomes views.

    Attributes:
        size: height and width of the view of the whole page, in pixels.
        padded: whether it keeps its proportions there; else it is stretched.
        tile: height and width of its tiles, in pixels; 0 for none.
    """

    size: int
    padded: bool
    tile: int = 0


@dataclass(frozen=True)
class Pages:
    """How the pages of a family become views.

    Attributes:
        modes: by name.
        mode: the name of the one in force.
        max_tiles: most tiles of an image.
        tokens: (side of the whole view, side of a tile, both in tokens, tiles) -> tokens of the
            image.
        grids: whether the model's class takes the grid of tiles as well as their number.
        native: prefix of transformers' ``Processor`` and ``ImageProcessor`` classes.
        max_tokens: most tokens of an image; None for no limit.
        tiles_one: whether an image has tiles only if its prompt has no other.
    """

    modes: Mapping[str, ImageMode]
    mode: str
    max_tiles: int
    tokens: Callable[[int, int, Tiles], int]
    grids: bool
    native: str
    max_tokens: int | None = None
    tiles_one: bool = False

    @property
    def sizes(self) -> ImageMode:
        """Those of the mode in force."""
        return self.modes[self.mode]

    def tokens_of(self, tiles: Tiles) -> int:
        """Tokens of an image."""
        sides = self.sizes.size // TOKEN_PIXELS, self.sizes.tile // TOKEN_PIXELS
        return self.tokens(*sides, tiles)

    def allowed_grids(self) -> list[Tiles]:
        """The grids of tiles (across, down), smaller ones first."""
        most = self.max_tiles if self.sizes.tile else 0
        grids = [
            (across, down)
            for across in range(1, most + 1)
            for down in range(1, most // across + 1)
            if across * down > 1
        ]
        limit = self.max_tokens or float("inf")
        return sorted((grid for grid in grids if self.tokens_of(grid) <= limit), key=prod)


def page_pixels(folder: Path, pages: Pages) -> Pixels:
    """The views of a page: the whole, and in a mode with tiles its tiles.

    What processor_config.json states of a merged model goes before the mode of ``pages``.
    """
    stated = read_object_if_there(folder / PROCESSOR_FILE, PROCESSOR)
    return _pixels(
        replace(
            pages,
            mode=stated.get("image_mode", pages.mode),
            max_tiles=stated.get("max_tiles", pages.max_tiles),
            max_tokens=stated.get("max_image_tokens"),
        )
    )


def _pixels(pages: Pages) -> Pixels:
    sizes = pages.sizes
    side, tile_side = sizes.size // TOKEN_PIXELS, sizes.tile // TOKEN_PIXELS
    grids = pages.allowed_grids()

    def view(size: tuple[int, int], count: int) -> tuple[int, Tiles]:
        is_whole = pages.tiles_one and count > 1
        tiles = NO_TILES if is_whole else best_grid(size, sizes.tile, grids)
        return pages.tokens_of(tiles), tiles

    def sizes_of(tiles: Tiles) -> tuple[tuple[int, int], ...]:
        return ((1, sizes.size), *(((prod(tiles), sizes.tile),) if prod(tiles) else ()))

    limits = {"max_tiles": pages.max_tiles, "max_image_tokens": pages.max_tokens}
    entries = {"image_mode": pages.mode, **{k: n for k, n in limits.items() if n and grids}}
    return Pixels(
        tokens=None,
        view=view,
        sizes=sizes_of,
        rows=lambda tiles: side**2 + prod(tiles) * tile_side**2,
        transform=lambda image, tiles: _views(image, tiles, sizes),
        inputs=lambda views, tiles: _inputs(views, tiles, grids=pages.grids),
        fingerprint=repr((asdict(sizes), grids)),
        rotate=True,
        files=_files(sizes, pages.max_tiles, pages.native, entries),
        modes=tuple(pages.modes),
        in_mode=lambda mode: _pixels(replace(pages, mode=mode)),
        limit=(lambda tiles, tokens: _limited(pages, tiles, tokens)) if grids else None,
        stated={PROCESSOR_FILE: entries},
    )


def _limited(pages: Pages, most_tiles: int | None, most_tokens: int | None) -> Pixels:
    """The pixels with those grids alone that have at most so many tiles and tokens.

    Raises:
        ConfigError: not even the whole page has so few.
    """
    fewest = pages.tokens_of(NO_TILES)
    if most_tokens is not None and most_tokens < fewest:
        raise ConfigError(
            f"found {most_tokens}; the whole page has {fewest} in mode {pages.mode}",
            place="--max-image-tokens",
            hint="raise it, or choose another --image-mode",
        )
    most = min(most_tiles or pages.max_tiles, pages.max_tiles)
    return _pixels(replace(pages, max_tiles=most, max_tokens=most_tokens))


def _files(
    mode: ImageMode, max_tiles: int, native: str, entries: Mapping[str, Any]
) -> dict[str, Files]:
    """preprocessor_config.json and processor_config.json; the authors' layout has the latter.

    ``entries`` are what vlft alone writes and reads: the mode and the limits.
    """
    half = {"image_mean": list(HALF), "image_std": list(HALF)}
    original = {
        **half,
        "add_special_token": False,
        "candidate_resolutions": [[1024, 1024]],
        "downsample_ratio": 4,
        "ignore_id": -100,
        "image_token": IMAGE_TAG,
        "mask_prompt": False,
        "normalize": True,
        "pad_token": PAD,
        "patch_size": 16,
        "processor_class": "DeepseekVLV2Processor",
        "sft_format": "deepseek",
        **entries,
    }
    transformers = {
        **half,
        "image_processor_type": f"{native}ImageProcessor",
        "processor_class": f"{native}Processor",
        "size": {"height": mode.size, "width": mode.size},
        "crop_to_patches": mode.tile > 0,
        **({"tile_size": mode.tile, "max_patches": max_tiles} if mode.tile else {}),
    }
    chat = {"processor_class": f"{native}Processor", **entries}
    return {
        "original": {PROCESSOR_FILE: original},
        "transformers": {PREPROCESSOR_FILE: transformers, PROCESSOR_FILE: chat},
    }


def best_grid(image: tuple[int, int], tile: int, grids: Sequence[Tiles]) -> Tiles:
    """The grid of tiles with the proportions that are closest to the image's.

    None for an image of at most one tile. Among equals, a larger grid is taken if the image has
    more than half of its pixels. The image is (width, height) in pixels, the grids (across, down),
    smaller ones first.
    """
    width, height = image
    if max(image) <= tile:
        return NO_TILES
    best, closest = NO_TILES, float("inf")
    for grid in grids:
        distance = abs(width / height - grid[0] / grid[1])
        fills_half = width * height > 0.5 * tile * tile * prod(grid)
        if distance < closest or (distance == closest and fills_half):
            best, closest = grid, distance
    return best


def _views(image: Image, tiles: Tiles, mode: ImageMode) -> Views:
    """The whole page, (1, 3, S, S) float32, and its tiles row by row, if there are any."""
    square = (mode.size, mode.size)
    whole = ImageOps.pad(image, square, color=BORDER) if mode.padded else image.resize(square)
    views = [_values([whole])]
    if prod(tiles):
        large = image.resize((tiles[0] * mode.tile, tiles[1] * mode.tile))
        views.append(_values(split(large, tiles, mode.tile)))
    return tuple(views)


def _values(images: Sequence[Image]) -> Tensor:
    return normalised(torch.stack([to_floats(image) for image in images]), HALF, HALF)


def _inputs(views: Sequence[Views], tiles: Sequence[Tiles], *, grids: bool) -> dict[str, Any]:
    """Keyword arguments of the model's class."""
    found: dict[str, Any] = {"pixel_values": torch.cat([of_image[0] for of_image in views])}
    local = [of_image[1] for of_image in views if len(of_image) > 1]
    if local:
        found["pixel_values_local"] = torch.cat(local)
        found["num_local_patches"] = [prod(grid) for grid in tiles]
        if grids:
            found["patches_grid"] = [list(grid) for grid in tiles]
    return found
