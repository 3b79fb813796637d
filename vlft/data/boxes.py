"""Boxes on images -> the tags that DeepSeek-VL2 and DeepSeek-OCR read and write.

<|ref|>the cat<|/ref|><|det|>[[125, 125, 500, 874]]<|/det|>

The numbers are whole ones from 0 to 999, shares of the width and the height of the image as the
model gets it: the authors' code draws n at int(n / 999 * pixels).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, TypeGuard

from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlft.data.conversation import Box, Conversation, Turn

BOX_TAG, REF_TAG = "<bbox>", "<ref-object>"
REF = "<|ref|>{}<|/ref|>"
DET = "<|det|>[{}]<|/det|>"
# What the numbers of a box are -> the number that is the whole width or height; None for pixels.
KINDS = {"real": None, "norm1": 1, "norm1000": 1000}
LARGEST = 999
# How far a box may reach outside of its image, because numbers are rounded: in pixels, or as a
# share of the width or height.
PIXELS_OUTSIDE, SHARE_OUTSIDE = 1.0, 0.001
# Larger numbers cannot be coordinates in an image.
FARTHEST = 1e9
RUN = re.compile(f"(?:{BOX_TAG})+")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, as each corner of a box must be."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= FARTHEST


def write_boxes(conversation: Conversation) -> Conversation:
    """Replaces each ``<bbox>`` by the tags that the models were trained with.

    The facts about its images are known. Boxes that follow each other share one pair of tags.

    Raises:
        DataError: a box is inverted, or reaches outside of its image.
    """
    if not any(turn.boxes for turn in conversation.turns):
        return conversation
    return replace(conversation, turns=tuple(map(_written, conversation.turns)))


def _written(turn: Turn) -> Turn:
    boxes = iter(turn.boxes)
    parts = tuple(_filled(part, boxes) if isinstance(part, str) else part for part in turn.parts)
    return replace(turn, parts=parts, boxes=())


def _filled(text: str, boxes: Iterator[Box]) -> str:
    def det(run: re.Match[str]) -> str:
        count = len(run[0]) // len(BOX_TAG)
        return DET.format(", ".join(str(list(numbers(next(boxes)))) for _ in range(count)))

    return RUN.sub(det, text)


def numbers(box: Box) -> tuple[int, ...]:
    """The whole numbers, 0 to 999, of a box on an image whose size is known.

    Raises:
        DataError: it is inverted, or reaches outside of the image.
    """
    size = box.image.facts.size if box.image.facts else (0, 0)
    whole = KINDS[box.kind]
    sides = size if whole is None else (whole, whole)
    x1, y1, x2, y2 = box.corners
    if x2 < x1 or y2 < y1:
        raise DataError(
            f"{_shown(box)} is inverted: x1, y1, x2, y2 are allowed, the upper left corner first",
            hint="swap its corners; vlft data converts x, y, width, height",
        )
    slack = [PIXELS_OUTSIDE if whole is None else SHARE_OUTSIDE * whole] * 2
    outside = any(
        not -more <= value <= side + more
        for value, side, more in zip(box.corners, sides * 2, slack * 2, strict=True)
    )
    if outside:
        limits = f"of {size[0]} x {size[1]} pixels" if whole is None else f"of 0 to {whole}"
        hint = (
            "are the numbers x, y, width, height? vlft data converts them" if whole is None else ""
        )
        hint = hint or f'"bbox_type" is {box.kind}; real is for pixels'
        if whole is None and max(size) < max(box.corners) <= 1000:
            hint = 'write "bbox_type": "norm1000" if 1000 is the whole width or height'
        raise DataError(f"{_shown(box)} reaches outside of {box.image.given}, {limits}", hint=hint)
    # Rounded half up. Python's round() would take the even neighbour.
    shares = (value / side for value, side in zip(box.corners, sides * 2, strict=True))
    return tuple(min(max(int(share * LARGEST + 0.5), 0), LARGEST) for share in shares)


def _shown(box: Box) -> str:
    return f"{box.name} [{', '.join(f'{value:g}' for value in box.corners)}]"
