"""Boxes that a reply places on its image, in the tags of DeepSeek-VL2 and DeepSeek-OCR.

<|ref|>the cat<|/ref|><|det|>[[125, 125, 500, 874]]<|/det|>

Unlimited-OCR names it within the tag: <|det|>text [125, 125, 500, 874]<|/det|>. Numbers are shares
of width and height from 0 to 999; the overlap of two boxes in these equals that in pixels.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from vlft.data.boxes import LARGEST
from vlft.data.ocr_blocks import BOX, TYPE

DETECTION = re.compile(r"(?:<\|ref\|>(.*?)<\|/ref\|>\s*)?<\|det\|>(.*?)<\|/det\|>", re.DOTALL)
OPENING = "<|det|>"
# Least overlap of a box that is found, as in RefCOCO's accuracy.
FOUND = 0.5


class NamedBox(NamedTuple):
    """A box with what it is of, in shares from 0 to 999."""

    name: str
    left: float
    upper: float
    right: float
    lower: float


def box_iou(reply: str, reference: str) -> float:
    """Mean intersection over union of the reference's boxes with those of the reply, 0 to 1.

    Boxes are paired one to one, those of most overlap first; names count only if the reference has
    several. The sum is divided by the number of boxes of the side that has more: a box too few or
    too many is an overlap of 0. With one box each it is the IoU of RefCOCO.

    Raises:
        ValueError: the reference has no box.
    """
    overlaps, count = _overlaps(reply, reference)
    return sum(overlaps) / count


def box_accuracy(reply: str, reference: str) -> float:
    """Share of boxes found, 0 to 1: those paired as for box-iou with an IoU of 0.5 or more.

    With one box each it is the accuracy at 0.5 of RefCOCO (Yu et al. 2016).

    Raises:
        ValueError: the reference has no box.
    """
    overlaps, count = _overlaps(reply, reference)
    return sum(overlap >= FOUND for overlap in overlaps) / count


def box_parsed(reply: str, reference: str) -> float:  # noqa: ARG001 (the form of all metrics)
    """1 if a reply has boxes and all of its tags are closed around boxes that can be drawn, else 0.

    1 minus its mean is the share of parse failures.
    """
    tags = DETECTION.findall(reply)
    is_closed = len(tags) == reply.count(OPENING)
    return float(bool(tags) and is_closed and all(_drawable(text) for _, text in tags))


def _drawable(text: str) -> bool:
    """Whether a tag holds boxes alone, inside of the image and upper left corner first."""
    kind = TYPE.match(text)
    text = text[kind.end(1) :] if kind else text
    boxes = [[float(number) for number in box.groups()] for box in BOX.finditer(text)]
    rest = re.sub(r"[\s,\[\]]", "", BOX.sub("", text))
    return bool(boxes) and not rest and all(map(_is_box, boxes))


def _is_box(corners: list[float]) -> bool:
    left, upper, right, lower = corners
    return 0 <= left <= right <= LARGEST and 0 <= upper <= lower <= LARGEST


def _overlaps(reply: str, reference: str) -> tuple[list[float], int]:
    """The overlaps of the pairs, and the number of boxes of the side that has more."""
    wanted, found = _boxes(reference), _boxes(reply)
    if not wanted:
        raise ValueError("has no box in <|det|> tags, which the metric compares")
    by_name = len({box.name for box in wanted}) > 1
    pairs = sorted(
        (
            (_iou(a, b), i, j)
            for i, a in enumerate(wanted)
            for j, b in enumerate(found)
            if not by_name or a.name == b.name
        ),
        key=lambda pair: (-pair[0], *pair[1:]),
    )
    overlaps: list[float] = []
    taken: tuple[set[int], set[int]] = set(), set()
    for overlap, i, j in pairs:
        if i not in taken[0] and j not in taken[1]:
            overlaps.append(overlap)
            taken[0].add(i)
            taken[1].add(j)
    return overlaps, max(len(wanted), len(found))


def _boxes(text: str) -> list[NamedBox]:
    """The boxes in a text, as they stand there."""
    found = []
    for ref, inside in DETECTION.findall(text):
        kind = TYPE.match(inside)
        name = " ".join((ref or (kind[1] if kind else "")).casefold().split())
        found += [NamedBox(name, *map(float, box.groups())) for box in BOX.finditer(inside)]
    return found


def _iou(one: NamedBox, other: NamedBox) -> float:
    """Intersection over union; 0 for a box without area, or whose corners are swapped."""
    width = min(one.right, other.right) - max(one.left, other.left)
    height = min(one.lower, other.lower) - max(one.upper, other.upper)
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_area(one) + _area(other) - shared)


def _area(box: NamedBox) -> float:
    return (box.right - box.left) * (box.lower - box.upper)
