"""``--format``: what is made of the tags of a reply, beside the reply itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft.data.boxes import LARGEST
from vlft.data.ocr_blocks import read_blocks, split_pages, without_tags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlft.data.conversation import Conversation


def text_of(reply: str, form: str) -> str:
    """The text that is shown and saved."""
    return reply if form == "text" else without_tags(reply)


def columns_of(reply: str, form: str, conversation: Conversation) -> dict[str, Any]:
    """What a result line has of it besides.

    Boxes are in pixels of the record's image; without one from 0 to 999, as the model's. Of several
    images, each page of the reply is about one, in their order.
    """
    if form == "text":
        return {}
    found: dict[str, Any] = {"markdown": without_tags(reply)}
    if form == "blocks":
        sizes = [image.facts.size for image in conversation.images if image.facts]
        found["blocks"] = [
            block.as_row() | ({"page": page} if len(sizes) > 1 else {})
            for page, text in enumerate(split_pages(reply), start=1)
            for block in read_blocks(text, _size(sizes, page))
        ]
    return found


def _size(sizes: Sequence[tuple[int, int]], page: int) -> tuple[int, int]:
    """(width, height) of the image that a page of a reply is about, from 1: the last if too few."""
    return sizes[min(page, len(sizes)) - 1] if sizes else (LARGEST, LARGEST)
