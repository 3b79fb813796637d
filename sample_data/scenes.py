"""Images of printed text and of shapes, 64 x 64 RGB, drawn from the description of a scene.

Glyphs are drawn at four times the size and reduced, so that they are smooth. They are rotated by
a few degrees and not distorted: their shapes are those of the fonts.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

if TYPE_CHECKING:
    import random

SIZE = 64
SCALE = 4
MAX_ROTATION = 8.0  # degrees
MAX_SHIFT = 6.0  # pixels, of text from the centre
MAX_BLUR = 2.0  # pixels, standard deviation of a Gaussian

# The text fonts that matplotlib ships, and Pillow's own; matplotlib's other fonts are symbols.
FONTS = (
    *(f"DejaVuSans{mono}{style}" for mono in ("", "Mono")
      for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    "cmb10", "cmr10", "cmss10", "cmti10", "cmtt10", "pillow",
)  # fmt: skip

COLOURS = {
    "red": (208, 32, 40),
    "green": (34, 140, 52),
    "blue": (36, 72, 200),
    "yellow": (236, 206, 32),
    "orange": (240, 130, 20),
    "purple": (128, 40, 150),
    "black": (16, 16, 16),
    "white": (248, 248, 248),
}
LIGHT_COLOURS = ("yellow", "white")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "hexagon")


@dataclass(frozen=True)
class Scene:
    """The content of an image.

    Attributes:
        kind: digit, letter, number, word, shape or count.
        text: for the kinds digit, letter, number and word.
        shape: for the kinds shape and count.
        colour: name of the colour of shapes; dark or light for text.
        count: number of shapes.
    """

    kind: str
    text: str = ""
    shape: str = ""
    colour: str = ""
    count: int = 1


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The image of a scene; size, position, rotation, font, greys and blur are random."""
    if scene.text:
        mask = _text_mask(scene, rng)
        ink, paper = _text_colours(scene.colour, rng)
    else:
        mask = _shapes_mask(scene, rng)
        ink, paper = _shape_colours(scene.colour, rng)
    mask = mask.resize((SIZE, SIZE), Image.Resampling.BOX)
    image = Image.composite(
        Image.new("RGB", (SIZE, SIZE), ink), Image.new("RGB", (SIZE, SIZE), paper), mask
    )
    blur = rng.uniform(0.0, MAX_BLUR) if rng.random() < 0.5 else 0.0
    return image.filter(ImageFilter.GaussianBlur(blur)) if blur > 0.2 else image


@functools.lru_cache(maxsize=4096)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    if name == "pillow":
        return ImageFont.load_default(size)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / f"{name}.ttf", size)


def _text_mask(scene: Scene, rng: random.Random) -> Image.Image:
    """The text in one of the fonts, completely inside of the image."""
    name = rng.choice(FONTS)
    left, top, right, bottom = _font(name, 100).getbbox(scene.text)
    height = rng.uniform(36, 60) if len(scene.text) == 1 else rng.uniform(18, 36)
    # The height limits a slim glyph, the width a word.
    factor = min(height / (bottom - top), rng.uniform(46, 60) / (right - left))
    font = _font(name, round(100 * factor * SCALE))
    left, top, right, bottom = font.getbbox(scene.text)
    size = SIZE * SCALE
    x, y = _centre(rng, (right - left) / SCALE, (bottom - top) / SCALE, MAX_SHIFT)
    mask = Image.new("L", (size, size))
    place = (x * SCALE - (left + right) / 2, y * SCALE - (top + bottom) / 2)
    ImageDraw.Draw(mask).text(place, scene.text, font=font, fill=255)
    rotation = rng.uniform(-MAX_ROTATION, MAX_ROTATION) * rng.random()
    return mask.rotate(rotation, Image.Resampling.BICUBIC, center=(x * SCALE, y * SCALE))


def _centre(rng: random.Random, width: float, height: float, shift: float) -> tuple[float, float]:
    """The centre of an object: at most ``shift`` from the image's, the object inside of it."""
    x, y = (min(shift, max(0.0, SIZE - 2 - side) / 2) for side in (width, height))
    return SIZE / 2 + rng.uniform(-x, x), SIZE / 2 + rng.uniform(-y, y)


def _text_colours(colour: str, rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ink, paper): greys, or nearly, at least 100 of 255 levels apart."""
    dark = rng.randint(0, 90)
    light = rng.randint(max(130, dark + 100), 255)
    ink, paper = (dark, light) if colour == "dark" else (light, dark)
    return _tinted(ink, rng), _tinted(paper, rng)


def _tinted(grey: int, rng: random.Random) -> tuple[int, ...]:
    spread = rng.choice((0, 0, 0, 24))
    return tuple(min(255, max(0, grey + rng.randint(-spread, spread))) for _ in range(3))


def _shape_colours(colour: str, rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ink, paper): a variation of the named colour on a grey with enough contrast."""
    ink = tuple(min(255, max(0, level + rng.randint(-14, 14))) for level in COLOURS[colour])
    light_ink = colour in LIGHT_COLOURS
    paper = rng.randint(30, 110) if light_ink else rng.randint(160, 240)
    if colour in ("green", "purple", "blue", "red") and rng.random() < 0.2:
        paper = rng.randint(0, 20)
    return ink, _tinted(paper, rng)


def _shapes_mask(scene: Scene, rng: random.Random) -> Image.Image:
    """The shapes: one anywhere in the image, several in cells of a 3 x 3 grid."""
    mask = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
    if scene.kind == "shape":
        radius = rng.uniform(13, 27)
        places = [(*_centre(rng, 2 * radius, 2 * radius, SIZE), radius)]
    else:
        cells = rng.sample(range(9), scene.count)
        radius = rng.uniform(6.5, 8.5)
        places = [
            (_cell(cell % 3) + rng.uniform(-1, 1), _cell(cell // 3) + rng.uniform(-1, 1), radius)
            for cell in cells
        ]
    rotation = math.radians(rng.uniform(-MAX_ROTATION, MAX_ROTATION))
    for x, y, radius in places:
        part = Image.new("L", mask.size)
        _draw_shape(
            ImageDraw.Draw(part), scene.shape, x * SCALE, y * SCALE, radius * SCALE, rotation
        )
        mask = ImageChops.lighter(mask, part)
    return mask


def _cell(index: int) -> float:
    return SIZE * (index + 0.5) / 3


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, rotation: float
) -> None:
    if shape in ("circle", "ring"):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if shape == "ring":
            inner = radius * 0.6
            pen.ellipse((x - inner, y - inner, x + inner, y + inner), fill=0)
        return
    pen.polygon(
        [
            (x + radius * r * math.sin(a + rotation), y - radius * r * math.cos(a + rotation))
            for r, a in _corners(shape)
        ],
        fill=255,
    )


def _corners(shape: str) -> list[tuple[float, float]]:
    """(distance from the centre, angle from the top) of a polygon's corners, for radius 1."""
    if shape == "star":
        return [(0.42 if i % 2 else 1.0, math.pi * i / 5) for i in range(10)]
    if shape == "cross":
        wide = math.atan2(0.3, 1.0)
        arm = [(1.0, -wide), (1.0, wide), (0.42, math.pi / 4)]
        return [(r, a + quarter * math.pi / 2) for quarter in range(4) for r, a in arm]
    sides, start = {
        "triangle": (3, 0.0),
        "square": (4, math.pi / 4),
        "diamond": (4, 0.0),
        "hexagon": (6, math.pi / 6),
    }[shape]
    return [(1.0, start + 2 * math.pi * i / sides) for i in range(sides)]
