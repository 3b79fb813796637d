"""Prompts of which an image is drawn, and samples whose reply is an image.

User: a red square            conditional    bos, the prompt's tokens, <begin_of_image>
                              unconditional  bos, pad, pad, ..., pad, <begin_of_image>
Assistant:<begin_of_image>
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vlft.data.encode import IGNORE, EncodedImage, encode, facts_of

if TYPE_CHECKING:
    from pathlib import Path

    from vlft.data.conversation import Conversation, ImageFacts
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


def drawn_image(path: Path, facts: ImageFacts, chat: ChatFormat) -> EncodedImage:
    """The image of a reply; it has as many codes as an image of a question has tokens."""
    codes, _ = chat.view(facts.size, 1)
    return EncodedImage(path, facts.digest, codes - 1, drawn=True)


def encode_sample(conversation: Conversation, chat: ChatFormat) -> EncodedSample:
    """The ids and labels of a conversation, see ``encode``; its reply may be an image."""
    if conversation.drawn is None:
        return encode(conversation, chat)
    ref, place = conversation.drawn, conversation.place
    prompt = with_start(encode(as_prompt(conversation), chat), chat)
    image = drawn_image(ref.path, facts_of(ref, chat, place), chat)
    codes = torch.full((image.tokens,), chat.image_token_id)
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, codes]),
        labels=torch.cat([prompt.labels, torch.full_like(codes, IGNORE)]),
        images=(*prompt.images, image),
    )


def as_prompt(conversation: Conversation) -> Conversation:
    """The conversation without its reply; without system prompt if it states none."""
    system = SYSTEM_PROMPT if conversation.system is None else conversation.system
    return replace(conversation.without_reply(), system=system)


def unconditional(sample: EncodedSample, chat: ChatFormat) -> EncodedSample:
    """The sample with all of its prompt but the first and the last token padding.

    The padding is attended to, as in the authors' code. Earlier replies are not trained any more.
    """
    drawn = sample.drawn
    end = len(sample) - (drawn.tokens if drawn else 0) - 1
    ids, labels = sample.input_ids.clone(), torch.full_like(sample.labels, IGNORE)
    ids[1:end] = chat.pad_id
    return replace(sample, input_ids=ids, labels=labels, images=(drawn,) if drawn else ())
