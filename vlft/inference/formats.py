"""``--format``: what is made of the tags of a reply, beside the reply itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft.data.boxes import LARGEST
from vlft.data.ocr_blocks import read_blocks, without_tags

if TYPE_CHECKING:
    from vlft.data.conversation import Conversation


def text_of(reply: str, form: str) -> str:
    """The text that is shown and saved."""
    return reply if form == "text" else without_tags(reply)


def columns_of(reply: str, form: str, conversation: Conversation) -> dict[str, Any]:
    """What a result line has of it besides.

    Boxes are in pixels of the record's last image; without one from 0 to 999, as the model's.
    """
    if form == "text":
        return {}
    found: dict[str, Any] = {"markdown": without_tags(reply)}
    if form == "blocks":
        facts = [image.facts.size for image in conversation.images if image.facts]
        size = facts[-1] if facts else (LARGEST, LARGEST)
        found["blocks"] = [block.as_row() for block in read_blocks(reply, size)]
    return found
