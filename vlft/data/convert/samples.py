"""What the converters share: their options, what they find, and the records that they make."""

from __future__ import annotations

import functools
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlft.data.boxes import BOX_TAG, REF_TAG
from vlft.data.download import ADDRESS
from vlft.data.layouts.place import COMMON_TAG
from vlft.errors import DataError, shown

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vlft.errors import UsageError

# As the authors of DeepSeek-OCR publish them.
READ_TEXT = "Free OCR."
READ_LINES = "<|grounding|>OCR this image."
READ_LAYOUT = "<|grounding|>Convert the document to markdown."
LOCATE = f"Locate {REF_TAG} in the image."
DESCRIBE = "Describe this image in one sentence."
# Digits of a share of a page's side; one of 999 steps is 0.001.
DIGITS = 5
MOST_BESIDE = 20

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Options:
    """How files are converted; see the flags of the same names."""

    image_root: Path | None = None
    prompt: str | None = None
    boxes: bool = False
    box_format: str | None = None


@dataclass
class Found:
    """What became of the files so far.

    Attributes:
        rows: records.
        problems: of what could not become one.
        left_out: what was left out on purpose, in words -> how often.
        flags: names of the options that decided something, of those that not every file has.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[UsageError] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    flags: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Block:
    """A part of a page.

    Attributes:
        ref: what it is, or its text where the text is what a box is labelled with.
        text: below its box; empty for none.
        corners: shares of the page's width and height; None if they are not asked for.
    """

    ref: str
    text: str
    corners: Corners | None = None


def image_of(name: Any, source: Path, options: Options, place: str) -> str:
    """The absolute path, or the address, of an image that a file names.

    Raises:
        DataError: no text, or there is no such file.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DataError(f"found {name!r:.60} as the name of an image", place=place)
    if ADDRESS.match(name):
        return name
    folder = options.image_root or source.parent
    path = folder / name
    # Unlike Path.is_file, without an error for names that no file can have.
    if not os.path.isfile(path):  # noqa: PTH113
        elsewhere = None if options.image_root else _elsewhere(name, source)
        hint = "paths start at the file's folder, or at --image-root"
        if elsewhere is not None:
            hint = f"it is in {shown(elsewhere)}: add --image-root {shown(elsewhere)}"
        raise DataError(f"no such image: {shown(path)}", place=place, hint=hint)
    return os.path.abspath(path)  # noqa: PTH100 (links are kept)


def _elsewhere(name: str, source: Path) -> Path | None:
    """The folder above that of a file, or one beside it, that has an image."""
    above = source.parent.absolute().parent
    folders = [above, *_beside(above)]
    return next((path for path in folders if os.path.isfile(path / name)), None)  # noqa: PTH113


@functools.lru_cache(maxsize=1)
def _beside(above: Path) -> list[Path]:
    """The first folders of a folder; of each missing image they are looked through."""
    with suppress(OSError):
        return [path for path in sorted(above.iterdir())[:MOST_BESIDE] if path.is_dir()]
    return []


def make_row(
    name: str, image: str, question: str, reply: str, objects: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A record of one question on one image, which starts the question unless it has a tag."""
    asked = question if COMMON_TAG in question else f"{COMMON_TAG}\n{question}"
    turns = (("user", asked), ("assistant", reply))
    row: dict[str, Any] = {
        "id": name,
        "messages": [{"role": role, "content": content} for role, content in turns],
        "images": [image],
    }
    return row if objects is None else {**row, "objects": objects}


def located(
    name: str, image: str, ref: str, boxes: Sequence[Sequence[float]], options: Options
) -> dict[str, Any]:
    """A record that asks where something is; the boxes are in pixels."""
    question = options.prompt or LOCATE
    reply = BOX_TAG * len(boxes)
    reply = reply if REF_TAG in question else REF_TAG + reply
    objects = {"ref": [ref], "bbox": [list(box) for box in boxes], "bbox_type": "real"}
    return make_row(name, image, question, reply, objects)


def add_page(
    name: str,
    image: str,
    blocks: Sequence[Block],
    questions: tuple[str, str],
    options: Options,
    found: Found,
) -> None:
    """Adds a record of the text of a page, with boxes each block below its own.

    Args:
        name: of the record.
        image: its path.
        blocks: in reading order.
        questions: without boxes and with, unless ``--prompt`` is given.
        options: see Options.
        found: where the record goes.
    """
    found.flags.add("boxes")
    if not blocks:
        found.left_out["pages without text"] += 1
        return
    question = options.prompt or questions[options.boxes]
    # Lines follow each other, paragraphs are apart.
    separator = "\n\n" if any(block.text for block in blocks) else "\n"
    if not options.boxes:
        reply = separator.join(block.text or block.ref for block in blocks)
        found.rows.append(make_row(name, image, question, reply))
        return
    tags = f"{REF_TAG}{BOX_TAG}"
    reply = separator.join(f"{tags}\n{block.text}" if block.text else tags for block in blocks)
    objects = {
        "ref": [block.ref for block in blocks],
        "bbox": [block.corners for block in blocks],
        "bbox_type": "norm1",
    }
    found.rows.append(make_row(name, image, question, reply, objects))


def shares(box: Sequence[float], width: float, height: float) -> Corners:
    """A box as shares of the sides of its page."""
    x1, y1, x2, y2 = (
        round(value / side, DIGITS) for value, side in zip(box, (width, height) * 2, strict=True)
    )
    return (x1, y1, x2, y2)
