"""Prompts of which an image is drawn.

User: a red square            conditional    bos, the prompt's tokens, <begin_of_image>
                              unconditional  bos, pad, pad, ..., pad, <begin_of_image>
Assistant:<begin_of_image>
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vlft.data.encode import IGNORE

if TYPE_CHECKING:
    from vlft.data.encode import ChatFormat, EncodedSample

# Like the authors' code, which draws without the system prompt of understanding.
SYSTEM_PROMPT = ""


def with_start(prompt: EncodedSample, chat: ChatFormat) -> EncodedSample:
    """The prompt with the tokens that begin an image at its end."""
    start = torch.tensor(chat.image_border[0])
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, start]),
        labels=torch.cat([prompt.labels, torch.full_like(start, IGNORE)]),
    )


def unconditional(prompt: EncodedSample, chat: ChatFormat) -> EncodedSample:
    """The prompt of ``with_start`` with all but its first and its last token padding.

    The padding is attended to, as in the authors' code.
    """
    ids = torch.full_like(prompt.input_ids, chat.pad_id)
    ids[0], ids[-1] = prompt.input_ids[0], prompt.input_ids[-1]
    return replace(prompt, input_ids=ids, images=())
