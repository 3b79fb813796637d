"""What DeepSeek-OCR writes about a page -> blocks with boxes in pixels, and markdown without tags.

<|ref|>title<|/ref|><|det|>[[125, 60, 500, 99]]<|/det|>
# The heading

<|ref|>text<|/ref|><|det|>[[125, 140, 500, 874]]<|/det|>
A paragraph.

Replies may be cut off or damaged: whatever is not of this form is text, and nothing raises.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vlft.data.boxes import LARGEST

if TYPE_CHECKING:
    from collections.abc import Mapping

TAG = re.compile(r"<\|(/?(?:ref|det)|grounding)\|>")
# Unlimited-OCR's, of replies about several pages.
PAGE = "<PAGE>"
NUMBER = r"\s*(-?\d{1,9}(?:\.\d{1,9})?)\s*"
BOX = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")
# Unlimited-OCR names the type within the tag: <|det|>text [1, 2, 3, 4]<|/det|>.
TYPE = re.compile(r"\s*([^\s\[\]][^\[\]]*?)\s*\[")


@dataclass(frozen=True)
class Block:
    """A part of a page.

    Attributes:
        type: what the model calls it, such as title, text or table; the text itself where it was
            asked to locate one; empty for text before the first tag.
        boxes: (left, upper, right, lower) in pixels.
        text: what follows its tags.
    """

    type: str
    boxes: list[list[int]]
    text: str

    def as_row(self) -> dict[str, Any]:
        """The block as JSON has it."""
        return asdict(self)


def read_blocks(reply: str, size: tuple[int, int]) -> list[Block]:
    """The blocks of a reply about an image of this (width, height) in pixels."""
    parts = {"ref": "", "det": "", "text": ""}
    blocks: list[Block] = []
    where = "text"
    for index, piece in enumerate(TAG.split(reply)):
        if index % 2 == 0:
            parts[where] += piece
        elif piece in ("ref", "det"):
            if piece == "ref" or parts["det"] or parts["text"].strip():
                blocks.append(_block(parts, where, size))
                parts = dict.fromkeys(parts, "")
            where = piece
        else:
            where = "text"
    blocks.append(_block(parts, where, size))
    return [block for block in blocks if block.type or block.boxes or block.text]


def split_pages(reply: str) -> list[str]:
    """The parts of a reply about each page; the model may mark the start of a page or its end."""
    return [part for part in reply.split(PAGE) if part.strip()] or [""]


def _block(parts: Mapping[str, str], where: str, size: tuple[int, int]) -> Block:
    """The block of what stands within and after its tags, of which ``where`` was not closed."""
    found = dict(parts)
    if where != "text":
        # A tag ends with its line; the next line is text.
        found[where], _, rest = parts[where].strip().partition("\n")
        found["text"] += rest
    inside = TYPE.match(found["det"])
    kind = found["ref"].strip() or (inside[1] if inside else "")
    return Block(kind, _boxes(found["det"], size), found["text"].strip())


def _boxes(text: str, size: tuple[int, int]) -> list[list[int]]:
    """The boxes in a text, in pixels, as the authors' code draws them; others are left out."""
    found = []
    for box in BOX.finditer(text):
        shares = [min(max(float(number) / LARGEST, 0.0), 1.0) for number in box.groups()]
        found.append([int(share * side) for share, side in zip(shares, size * 2, strict=True)])
    return found


def without_tags(reply: str) -> str:
    """The text of a reply as markdown; where tags hold all of it, the located texts, by line.

    Between pages the model's mark is left.
    """
    return f"\n\n{PAGE}\n\n".join(map(_plain, split_pages(reply)))


def _plain(reply: str) -> str:
    blocks = read_blocks(reply, (LARGEST, LARGEST))
    texts = [block.text for block in blocks if block.text]
    return "\n\n".join(texts) if texts else "\n".join(block.type for block in blocks)
