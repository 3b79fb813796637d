"""Conversations -> token ids and labels. The one function for training and inference alike.

Conversation --template--> chat text, reply spans --tokenizer--> ids, labels --images--> expanded
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlft.data.conversation import Conversation, ImageRef, Turn, flat_text
from vlft.data.images import inspect_image
from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tokenizers import Tokenizer
    from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class View:
    """How the model sees an image.

    Attributes:
        tokens: how many image tokens it becomes.
        tiles: (across, down), how many tiles it is cut into beside its whole view.
    """

    tokens: int
    tiles: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class ChatFormat:
    """What turns a conversation of one checkpoint into token ids.

    Attributes:
        template: Jinja source of the family's chat text.
        tokenizer: the checkpoint's, raw: it adds nothing by itself.
        roles: how the text names the user and the assistant.
        system_prompt: where the conversation leaves it open.
        image_tag: stands in the text for an image; a token of its own.
        image_token_id: of the tag.
        image_border: ids before and after each image's tokens; may be empty.
        view: ((width, height) of an image, number of images in the conversation) -> its View.
        tokenize_per_message: whether each message is tokenised on its own, and replies without the
            space before them, instead of the chat text as a whole.
        bos_id: put first.
        eos_token: closes a reply.
        eos_id: of eos_token.
        pad_id: fills the left of shorter rows in a batch.
    """

    template: str
    tokenizer: Tokenizer
    roles: tuple[str, str]
    system_prompt: str
    image_tag: str
    image_token_id: int
    image_border: tuple[tuple[int, ...], tuple[int, ...]]
    view: Callable[[tuple[int, int], int], View]
    tokenize_per_message: bool
    bos_id: int
    eos_token: str
    eos_id: int
    pad_id: int


@dataclass(frozen=True)
class EncodedImage:
    """An image of an encoded sample.

    Attributes:
        path: where its pixels come from.
        digest: of the file, see ImageFacts.
        tokens: how many image tokens it becomes.
        tiles: see View.
    """

    path: Path
    digest: str
    tokens: int
    tiles: tuple[int, int] = (0, 0)

    @property
    def key(self) -> str:
        """Equal for images with equal features: the same file, cut into tiles the same way."""
        across, down = self.tiles
        return self.digest if self.tiles == (0, 0) else f"{self.digest}/{across}x{down}"


@dataclass(frozen=True)
class EncodedSample:
    """A sample as the model sees it, without pixels.

    Attributes:
        input_ids: (T,) int64; an image is a run of image tokens.
        labels: (T,) int64; the token's id where it is trained, -100 elsewhere.
        text: the official chat text, image tags not expanded.
        images: one per run of image tokens, in order.
    """

    input_ids: Tensor
    labels: Tensor
    text: str
    images: tuple[EncodedImage, ...]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Outline:
    """A sample as planning sees it: a few hundred bytes, kept for every sample of a run.

    Attributes:
        ids: (E,) int32, token ids; each image is one element, whose id says nothing.
        places: of the images among the elements.
        images: in order.
        tokens: length of the sample; an image counts as many tokens as it becomes.
    """

    ids: np.ndarray[Any, np.dtype[np.int32]]
    places: tuple[int, ...]
    images: tuple[EncodedImage, ...]
    tokens: int

    def prefix_tokens(self, elements: int) -> int:
        """Length in tokens of a prefix of so many elements."""
        inside = zip(self.places, self.images, strict=True)
        return elements + sum(image.tokens - 1 for place, image in inside if place < elements)


def outline(sample: EncodedSample, image_token_id: int) -> Outline:
    """The outline of an encoded sample."""
    ids = sample.input_ids.numpy()
    kept = ids != image_token_id
    positions = np.flatnonzero(~kept)
    lengths = [image.tokens for image in sample.images]
    # Images may be side by side, so that a run of image tokens says nothing of their number.
    firsts = positions[np.cumsum([0, *lengths[:-1]])] if lengths else positions
    kept[firsts] = True
    places = np.cumsum(kept)[firsts] - 1
    return Outline(ids[kept].astype(np.int32), tuple(places.tolist()), sample.images, len(ids))


def encode(conversation: Conversation, chat: ChatFormat) -> EncodedSample:
    """The ids and labels of a conversation; one that ends with the user is a prompt for a reply.

    Trained are, in every assistant turn, the reply and its end-of-sentence token.
    """
    text, replies = render(conversation, chat)
    if chat.tokenize_per_message:
        ids, labels = _tokenize_messages(conversation, chat)
    else:
        ids, labels = _tokenize_text(text, replies, chat)
    images = _view_images(conversation, chat)
    tags = ids.count(chat.image_token_id)
    if tags != len(images):
        raise DataError(
            f"the chat text holds {tags} {chat.image_tag}, the conversation {len(images)} images",
            place=conversation.place,
        )
    ids, labels = _expand(ids, labels, images, chat)
    # Lists until here: a tensor operation per sample would wake all threads for nothing.
    return EncodedSample(torch.tensor(ids), torch.tensor(labels), text, images)


def render(conversation: Conversation, chat: ChatFormat) -> tuple[str, list[tuple[int, int]]]:
    """The official chat text, and the (start, end) of each trained stretch of it, in characters."""
    from transformers.utils.chat_template_utils import render_jinja_template

    system = chat.system_prompt if conversation.system is None else conversation.system
    texts, spans = render_jinja_template(
        [[_message(turn, chat) for turn in conversation.turns]],
        chat_template=chat.template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=conversation.turns[-1].role == "user",
        system=system,
        assistant=chat.roles[1],
        eos_token=chat.eos_token,
    )
    text = texts[0]
    cut = len(text) - len(text.lstrip())
    return text.strip(), [(start - cut, end - cut) for start, end in spans[0]]


def tokenize(text: str, chat: ChatFormat) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text, nothing added, and each token's (start, end) in characters."""
    encoding = chat.tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def _tokenize_text(
    text: str, replies: list[tuple[int, int]], chat: ChatFormat
) -> tuple[list[int], list[int]]:
    """Ids and labels of the chat text as one piece."""
    ids, offsets = tokenize(text, chat)
    labels = [
        token if _inside(start, replies) and token != chat.image_token_id else IGNORE
        for token, (start, _) in zip(ids, offsets, strict=True)
    ]
    return ids, labels


def _tokenize_messages(conversation: Conversation, chat: ChatFormat) -> tuple[list[int], list[int]]:
    """Ids and labels of the messages one by one: no token spans two of them."""
    system = chat.system_prompt if conversation.system is None else conversation.system
    ids = tokenize(system.strip(), chat)[0]
    labels = [IGNORE] * len(ids)
    for turn in conversation.turns:
        if turn.role == "user":
            text, _ = render(replace(conversation, turns=(turn,), system=""), chat)
            piece = tokenize(text, chat)[0]
            labels += [IGNORE] * len(piece)
        else:
            piece = [*tokenize(flat_text(turn, chat.image_tag).strip(), chat)[0], chat.eos_id]
            labels += [IGNORE if token == chat.image_token_id else token for token in piece]
        ids += piece
    return ids, labels


def _view_images(conversation: Conversation, chat: ChatFormat) -> tuple[EncodedImage, ...]:
    """The images of a conversation, in order, as the model sees them.

    A file is opened only if its facts are not known yet, as for records given through Python.
    """
    references = conversation.images

    def view(ref: ImageRef) -> EncodedImage:
        facts = ref.facts or inspect_image(ref.path, place=conversation.place)
        view = chat.view(facts.size, len(references))
        return EncodedImage(ref.path, facts.digest, view.tokens, view.tiles)

    return tuple(map(view, references))


def _expand(
    ids: list[int], labels: list[int], images: tuple[EncodedImage, ...], chat: ChatFormat
) -> tuple[list[int], list[int]]:
    """Puts the begin of the sequence first, and each image's tokens in the place of its tag."""
    before, after = chat.image_border
    rest = iter(images)
    all_ids, all_labels = [chat.bos_id], [IGNORE]
    for token, label in zip(ids, labels, strict=True):
        if token == chat.image_token_id:
            run = [*before, *[token] * next(rest).tokens, *after]
            all_ids += run
            all_labels += [IGNORE] * len(run)
        else:
            all_ids.append(token)
            all_labels.append(label)
    return all_ids, all_labels


def _message(turn: Turn, chat: ChatFormat) -> dict[str, str]:
    role = chat.roles[0] if turn.role == "user" else chat.roles[1]
    return {"role": role, "content": flat_text(turn, chat.image_tag)}


def _inside(position: int, spans: list[tuple[int, int]]) -> bool:
    index = bisect_right(spans, position, key=lambda span: span[0]) - 1
    return index >= 0 and position < spans[index][1]
