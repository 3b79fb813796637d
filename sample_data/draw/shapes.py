"""Small images of coloured shapes with prompts, and a classifier that reads them back.

    python sample_data/draw/shapes.py OUT_DIR --train 1920 --val 64 [--base]

Writes OUT_DIR/train.jsonl and val.jsonl, records whose reply is an image, and the images, 32 x 32.
The tiny base has seen all of them, but of most it has heard only that they are figures
(``--base``): it knows the names of the pairs of KNOWN, in which colour and shape always go
together, so that it cannot tell which of the two words means what.

As a metric of ``vlft eval``, ``score`` says whether a drawing shows what its prompt asks for.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIDE = 32
# Images are drawn larger and made smaller, which gives smooth edges.
FINE = 8
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
}
SHAPES = ("square", "circle", "triangle", "cross")
KNOWN = tuple(zip(COLOURS, SHAPES, strict=True))
WORDINGS = ("a {}", "Draw a {}.", "one {} on white", "Please draw a {}!")
UNNAMED = "figure"
# A pixel belongs to the shape if a channel is at least so far from white.
INK = 60
# Smallest overlap (intersection over union) of what was drawn with the shape that it is taken for,
# and largest distance to the colour, of 441.
OVERLAP, DISTANCE = 0.75, 90


class Figure(NamedTuple):
    """A shape: its centre and half its side, in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """As in prompts, e.g. ``red square``."""
        return f"{self.colour} {self.shape}"


def main() -> None:
    """Writes both files and the images."""
    parser = argparse.ArgumentParser(description="Make images of coloured shapes.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--train", type=int, default=1920)
    parser.add_argument("--val", type=int, default=64)
    parser.add_argument("--base", action="store_true", help="name the known pairs alone")
    options = parser.parse_args()
    for name, count in (("train", options.train), ("val", options.val)):
        write_records(options.out_dir, name, count, of_base=options.base)


def write_records(folder: Path, name: str, count: int, *, of_base: bool) -> None:
    """NAME.jsonl and its images; pairs and wordings take turns."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            turn, place = divmod(number, len(pairs))
            figure = random_figure(random.Random(f"{name} {of_base} {number}"), *pairs[place])
            image = f"{name}/{number:05}.png"
            draw(figure).save(folder / image)
            known = not of_base or pairs[place] in KNOWN
            called = figure.name if known else UNNAMED
            query = WORDINGS[turn % len(WORDINGS)].format(called)
            file.write(json.dumps({"query": query, "response_images": [image]}) + "\n")


def random_figure(rng: random.Random, colour: str, shape: str) -> Figure:
    """A shape of this kind, somewhere in the image."""
    radius = rng.uniform(8, 12)
    x, y = (SIDE / 2 + rng.uniform(-3, 3) for _ in range(2))
    return Figure(colour, shape, x, y, radius)


def draw(figure: Figure) -> Image.Image:
    """The image of a shape on white."""
    large = Image.new("RGB", (SIDE * FINE, SIDE * FINE), "white")
    pen, colour = ImageDraw.Draw(large), COLOURS[figure.colour]
    for outline in _outlines(figure):
        pen.polygon([(x * FINE, y * FINE) for x, y in outline], fill=colour)
    return large.resize((SIDE, SIDE), Image.Resampling.BOX)


def score(reply: str, reference: str) -> bool:
    """Whether the drawing in a file shows what a prompt asks for."""
    with Image.open(reply) as image:
        found = classify(image)
    return found is not None and found in reference


def classify(image: Image.Image) -> str | None:
    """Colour and shape in an image, e.g. ``red square``; None if there is no such thing.

    What is not white is compared with each shape of the same bounding box, and its mean colour
    with each colour.
    """
    pixels = np.asarray(image.convert("RGB"), np.int64)
    ink = (255 - pixels).max(-1) >= INK
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    if not len(rows):
        return None
    bounds = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    overlaps = {shape: _overlap(ink, _filled(shape, bounds)) for shape in SHAPES}
    mean = pixels[ink].mean(0)
    distances = {name: math.dist(mean, colour) for name, colour in COLOURS.items()}
    shape, colour = (
        max(overlaps, key=overlaps.__getitem__),
        min(distances, key=distances.__getitem__),
    )
    if overlaps[shape] < OVERLAP or distances[colour] > DISTANCE:
        return None
    return f"{colour} {shape}"


def _outlines(figure: Figure) -> list[list[tuple[float, float]]]:
    """Polygons that make up a shape, in pixels."""
    _, shape, x, y, r = figure
    if shape == "square":
        return [_box(x - r, y - r, x + r, y + r)]
    if shape == "triangle":
        return [[(x, y - r), (x + r, y + r), (x - r, y + r)]]
    if shape == "cross":
        third = r / 3
        return [_box(x - r, y - third, x + r, y + third), _box(x - third, y - r, x + third, y + r)]
    turns = [2 * math.pi * step / 64 for step in range(64)]
    return [[(x + r * math.cos(turn), y + r * math.sin(turn)) for turn in turns]]


def _box(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _filled(shape: str, bounds: tuple[int, int, int, int]) -> np.ndarray:
    """(32, 32) bool, the pixels of a shape that fills a box (left, top, right, bottom)."""
    left, top, right, bottom = bounds
    mask = Image.new("L", (SIDE * FINE, SIDE * FINE))
    pen = ImageDraw.Draw(mask)
    for outline in _outlines(Figure("red", shape, 1, 1, 1)):
        points = [
            (FINE * (left + x * (right - left) / 2), FINE * (top + y * (bottom - top) / 2))
            for x, y in outline
        ]
        pen.polygon(points, fill=255)
    return np.asarray(mask.resize((SIDE, SIDE), Image.Resampling.BOX)) >= 128


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


if __name__ == "__main__":
    main()
