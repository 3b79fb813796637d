"""Small document images with their text: plain pages for the base, documents to tune on.

    python sample_data/ocr/pages.py OUT_DIR --train 600 --val 80 --seed 0

Writes OUT_DIR/images/train-0000.png, ... and OUT_DIR/train.jsonl and val.jsonl: notes, lists and
receipts with a table, in two fonts, rotated by up to two degrees, with noise. Page i depends on the
seed, its part and i alone.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

QUERY = "<image>\nFree OCR."
SIDE = 256  # pixels of a page
LINE = 42  # pixels from one base line to the next
COLUMN = 10  # characters that fit on a line
FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf")
SIZES = (33, 37)  # pixels
ROTATION = 2.0  # degrees, either way

TEXT = (
    "cup desk dish door egg fish fork glue ink jam key lamp lime map milk mug nail nut oil "
    "oven pea pear pen plum pot rice rope rug salt seed soap soup tape tea tin vase wax wire "
    "wood wool yarn zinc about after again every first from green here just large last made "
    "many month near never next only open order other over paid quick ready same sent small "
    "some soon still store thank their there this today under until very was week were when "
    "will with would year you"
)
WORDS = TEXT.split()
GOODS = WORDS[: WORDS.index("about")]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PUNCTUATION = ".,-:"
ALPHABET = LETTERS + "0123456789" + PUNCTUATION


class Glyph(NamedTuple):
    """A printed character and its centre, in parts of the page's width and height."""

    text: str
    x: float
    y: float


@dataclass(frozen=True)
class Page:
    """What is printed on a page: rows of cells, from top to bottom.

    Attributes:
        rows: a row of one cell is a line of text, others belong to a table.
        heading: whether the first row is one.
        ruled: whether the table has lines.
    """

    rows: tuple[tuple[str, ...], ...]
    heading: bool = False
    ruled: bool = False

    @property
    def plain(self) -> str:
        """The text, line by line."""
        return "\n".join(" ".join(row) for row in self.rows)

    @property
    def markdown(self) -> str:
        """The text with its heading and its table as markdown."""
        lines: list[str] = []
        before = 0
        for number, row in enumerate(self.rows):
            under_heading = self.heading and number == 1
            if under_heading or (number and (len(row) > 1) != (before > 1)):
                lines.append("")
            if len(row) > 1:
                lines.append(f"| {' | '.join(row)} |")
                if before < 2:
                    lines.append("|" + "---|" * len(row))
            else:
                lines.append(f"# {row[0]}" if self.heading and not number else row[0])
            before = len(row)
        return "\n".join(lines)


def plain_page(rng: random.Random, rows: tuple[int, int]) -> Page:
    """A page for the base: lines and columns of words, numbers and letters without a meaning.

    ``rows`` are the fewest and the most of them.
    """
    columns = rng.choice((0, 0, 2))
    made = []
    for _ in range(rng.randint(*rows)):
        if columns and rng.random() < 0.8:
            width = COLUMN // columns - 1
            made.append(tuple(_cell(rng, width) for _ in range(columns)))
        else:
            made.append((_line(rng),))
    return Page(tuple(made), ruled=rng.random() < 0.4)


def document(rng: random.Random) -> Page:
    """A note, a list or a receipt."""
    title = (f"{rng.choice(GOODS)} {rng.randint(1, 99)}",)
    kind = rng.choice(("note", "list", "receipt"))
    if kind == "note":
        return Page((title, *((_prose(rng),) for _ in range(rng.randint(2, 4)))), heading=True)
    goods = rng.sample(GOODS, 2)
    if kind == "list":
        head, rows = ("item", "no"), [(good, str(rng.randint(1, 99))) for good in goods]
        return Page((title, head, *rows), heading=True, ruled=rng.random() < 0.5)
    prices = [rng.randint(10, 299) for _ in goods]
    rows = [(good, _money(price)) for good, price in zip(goods, prices, strict=True)]
    total = (f"sum: {_money(sum(prices))}",)
    return Page((title, ("item", "eur"), *rows, total), heading=True, ruled=rng.random() < 0.5)


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02}"


def _prose(rng: random.Random) -> str:
    line = rng.choice(WORDS)
    while len(line) + 2 < COLUMN:
        word = rng.choice(WORDS)
        if len(line) + len(word) + 2 > COLUMN:
            break
        line += f" {word}"
    return line + rng.choice(("", "", ".", ","))


def _line(rng: random.Random) -> str:
    line = _cell(rng, COLUMN)
    while len(line) + 3 < COLUMN and rng.random() < 0.85:
        line += " " + _cell(rng, COLUMN - len(line) - 1)
    return line


def _cell(rng: random.Random, width: int) -> str:
    """A word, a number or letters without a meaning, of at most ``width`` characters."""
    kind = rng.random()
    if kind < 0.4:
        text = rng.choice(WORDS)
    elif kind < 0.65:
        text = rng.choice((str(rng.randint(0, 9999)), _money(rng.randint(0, 9999))))
    else:
        text = "".join(rng.choices(LETTERS, k=rng.randint(1, 5)))
    if rng.random() < 0.15:
        text = text[: width - 1] + rng.choice(PUNCTUATION)
    return text[:width]


def draw(page: Page, rng: random.Random) -> tuple[Image.Image, list[Glyph]]:
    """The image, grey, and what stands where on it."""
    font = _font(rng.choice(FONTS), rng.randint(*SIZES))
    ink, paper = rng.randint(0, 70), rng.randint(215, 255)
    image = Image.new("L", (SIDE, SIDE), paper)
    canvas = ImageDraw.Draw(image)
    left = rng.randint(6, 14)
    top = rng.randint(LINE, LINE + max(0, (SIDE - LINE) - LINE * len(page.rows) - 8))
    angle = rng.uniform(-ROTATION, ROTATION)
    glyphs: list[Glyph] = []
    for number, row in enumerate(page.rows):
        base = top + number * LINE
        step = (SIDE - 2 * left) / len(row)
        for column, text in enumerate(row):
            x = left + column * step + (6 if len(row) > 1 else 0)
            canvas.text((x, base), text, fill=ink, font=font, anchor="ls")
            glyphs += _glyphs(text, x, base, font, angle)
        if page.ruled and len(row) > 1:
            box = (left, base - LINE + 8, SIDE - left, base + 8)
            canvas.rectangle(box, outline=ink)
            for column in range(1, len(row)):
                x = left + column * step
                canvas.line((x, box[1], x, box[3]), fill=ink)
    turned = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=paper)
    generator = np.random.default_rng(rng.getrandbits(32))
    noise = generator.standard_normal((SIDE, SIDE), dtype=np.float32) * rng.uniform(0, 14)
    pixels = np.clip(np.asarray(turned, dtype=np.float32) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels), glyphs


_LOADED: dict[tuple[str, int], ImageFont.FreeTypeFont] = {}


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    if (name, size) not in _LOADED:
        _LOADED[name, size] = ImageFont.truetype(str(folder / name), size)
    return _LOADED[name, size]


def _glyphs(
    text: str, left: float, base: float, font: ImageFont.FreeTypeFont, angle: float
) -> list[Glyph]:
    """The characters of a text that starts at (left, base), after the page was turned."""
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    found = []
    ends = [font.getlength(text[:count]) for count in range(len(text) + 1)]
    for character, start, end in zip(text, ends[:-1], ends[1:], strict=True):
        x, y = left + (start + end) / 2 - SIDE / 2, base - 0.3 * font.size - SIDE / 2
        turned = (x * cosine + y * sine, y * cosine - x * sine)
        found.append(Glyph(character, *(0.5 + part / SIDE for part in turned)))
    return [glyph for glyph in found if glyph.text != " "]


def main() -> None:
    """Writes the documents and their records."""
    parser = argparse.ArgumentParser(description="Make document images with markdown.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--val", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    (options.out_dir / "images").mkdir(parents=True, exist_ok=True)
    for part, count in (("train", options.train), ("val", options.val)):
        with (options.out_dir / f"{part}.jsonl").open("w", encoding="utf-8") as file:
            for index in range(count):
                rng = random.Random(f"{part} {options.seed} {index}")
                page = document(rng)
                name = f"images/{part}-{index:04}.png"
                draw(page, rng)[0].save(options.out_dir / name)
                record = {"query": QUERY, "response": page.markdown, "images": [name]}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
