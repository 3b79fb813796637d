"""Conversations -> token ids and labels. The one function for training and inference alike.

conversation --template--> chat text, reply spans --tokenizer--> ids, labels
             --image tags replaced by the tokens of the images--> EncodedSample
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlft.data.conversation import Conversation, Turn, flat_text
from vlft.data.download import downloaded
from vlft.data.images import inspect_image
from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tokenizers import Tokenizer
    from torch import Tensor

IGNORE = -100


# (across, down): the grid of tiles in addition to the view of the whole image.
Tiles = tuple[int, int]


@dataclass(frozen=True)
class ChatFormat:
    """What turns a conversation of one checkpoint into token ids.

    Attributes:
        template: Jinja source of the chat template.
        tokenizer: of the checkpoint; adds no special tokens by itself.
        roles: names of user and assistant in the chat text.
        system_prompt: default, for conversations whose own is None.
        image_tag: a single token that stands for an image in the chat text.
        image_token_id: id of the tag.
        image_border: ids before and after the tokens of each image; may be empty.
        view: ((width, height) of an image, number of images in the conversation) -> (number of
            its tokens, its tiles).
        rotate: whether an image is turned by its EXIF orientation.
        tokenize_per_message: whether each message is tokenised on its own, and replies without the
            space before them, instead of the chat text as a whole.
        bos_id: first token of every sample.
        eos_token: end-of-sentence token, which ends a reply.
        pad_id: for left padding of plain batches.
    """

    template: str
    tokenizer: Tokenizer
    roles: tuple[str, str]
    system_prompt: str
    image_tag: str
    image_token_id: int
    image_border: tuple[tuple[int, ...], tuple[int, ...]]
    view: Callable[[tuple[int, int], int], tuple[int, Tiles]]
    rotate: bool
    tokenize_per_message: bool
    bos_id: int
    eos_token: str
    eos_id: int
    pad_id: int


@dataclass(frozen=True)
class EncodedImage:
    """An image of an encoded sample.

    Attributes:
        digest: see ImageFacts.
        tokens: number of image tokens.
        tiles: see Tiles; (0, 0) in families without tiles.
    """

    path: Path
    digest: str
    tokens: int
    tiles: Tiles = (0, 0)

    @property
    def key(self) -> str:
        """Equal for images with equal features: the same file, cut into tiles the same way."""
        across, down = self.tiles
        return self.digest if self.tiles == (0, 0) else f"{self.digest}/{across}x{down}"

    @property
    def views(self) -> int:
        """Number of views: the whole image and its tiles."""
        return 1 + self.tiles[0] * self.tiles[1]


@dataclass(frozen=True)
class EncodedSample:
    """A sample as the model gets it, without pixels.

    Attributes:
        input_ids: (T,) int64; an image is a run of image tokens.
        labels: (T,) int64; the token's id where it is trained, -100 elsewhere.
        text: the official chat text, image tags not expanded.
        images: in the order of their tokens.
    """

    input_ids: Tensor
    labels: Tensor
    text: str
    images: tuple[EncodedImage, ...]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Outline:
    """What rows are planned from: a few hundred bytes, kept for every sample of a run.

    Attributes:
        ids: (E,) int32, token ids; an image is a single element with the id of the image token.
        places: indices of the images in ids.
        images: in order.
        tokens: length of the sample, all tokens of its images included.
        targets: how many of them are trained.
    """

    ids: np.ndarray[Any, np.dtype[np.int32]]
    places: tuple[int, ...]
    images: tuple[EncodedImage, ...]
    tokens: int
    targets: int

    def prefix_tokens(self, elements: int) -> int:
        """Number of tokens in the first ``elements`` elements."""
        inside = zip(self.places, self.images, strict=True)
        return elements + sum(image.tokens - 1 for place, image in inside if place < elements)


def outline(sample: EncodedSample, image_token_id: int) -> Outline:
    """The outline of an encoded sample."""
    ids = sample.input_ids.numpy()
    kept = ids != image_token_id
    positions = np.flatnonzero(~kept)
    lengths = [image.tokens for image in sample.images]
    # Adjacent images form a single run of image tokens, so runs cannot be counted.
    firsts = positions[np.cumsum([0, *lengths[:-1]])] if lengths else positions
    kept[firsts] = True
    places = np.cumsum(kept)[firsts] - 1
    # The first token has no predecessor that could predict it.
    targets = int((sample.labels[1:] != IGNORE).sum())
    elements = ids[kept].astype(np.int32)
    return Outline(elements, tuple(places.tolist()), sample.images, len(ids), targets)


def encode(conversation: Conversation, chat: ChatFormat) -> EncodedSample:
    """The ids and labels of a conversation; one that ends with the user is a prompt for a reply.

    Every reply that is to be trained is, with its end-of-sentence token.
    """
    text, replies = _render(conversation, chat)
    if chat.tokenize_per_message:
        ids, labels = _tokenize_messages(conversation, chat)
    else:
        ids, labels = _tokenize_text(text, replies, chat)
    images = _view_images(conversation, chat)
    tags = ids.count(chat.image_token_id)
    if tags != len(images):
        raise DataError(
            f"{tags} {chat.image_tag} in the chat text, {len(images)} images in the conversation",
            place=conversation.place,
        )
    ids, labels = _expand(ids, labels, images, chat)
    # Python lists until here: on so few elements, tensor operations would cost more time.
    return EncodedSample(torch.tensor(ids), torch.tensor(labels), text, images)


def _render(conversation: Conversation, chat: ChatFormat) -> tuple[str, list[tuple[int, int]]]:
    """The official chat text, and (start, end) of each trained span of it, in characters."""
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
    # Each reply is one span; a chat may have an empty one, which has none.
    replies = [t for t in conversation.turns if t.role == "assistant" and flat_text(t, "").strip()]
    trained = [s for s, turn in zip(spans[0], replies, strict=True) if turn.is_trained]
    return text.strip(), [(start - cut, end - cut) for start, end in trained]


def tokenize(text: str, chat: ChatFormat) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text, without special tokens, and (start, end) of each in characters."""
    encoding = chat.tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def _tokenize_text(
    text: str, replies: list[tuple[int, int]], chat: ChatFormat
) -> tuple[list[int], list[int]]:
    """Ids and labels of the whole chat text."""
    ids, offsets = tokenize(text, chat)
    labels = [
        token if _inside(start, replies) and token != chat.image_token_id else IGNORE
        for token, (start, _) in zip(ids, offsets, strict=True)
    ]
    return ids, labels


def _tokenize_messages(conversation: Conversation, chat: ChatFormat) -> tuple[list[int], list[int]]:
    """Ids and labels of each message on its own, so that no token spans two of them."""
    system = chat.system_prompt if conversation.system is None else conversation.system
    ids = tokenize(system.strip(), chat)[0]
    labels = [IGNORE] * len(ids)
    for turn in conversation.turns:
        if turn.role == "user":
            text, _ = _render(replace(conversation, turns=(turn,), system=""), chat)
            piece = tokenize(text, chat)[0]
            labels += [IGNORE] * len(piece)
        else:
            piece = [*tokenize(flat_text(turn, chat.image_tag).strip(), chat)[0], chat.eos_id]
            ignored = chat.image_token_id
            labels += [t if turn.is_trained and t != ignored else IGNORE for t in piece]
        ids += piece
    return ids, labels


def _view_images(conversation: Conversation, chat: ChatFormat) -> tuple[EncodedImage, ...]:
    """The images of a conversation with what they become, in order.

    A file is opened only if its facts are not known yet, as for records given through Python.
    """
    images = []
    for ref in conversation.images:
        facts = ref.facts or inspect_image(
            downloaded(ref), place=conversation.place, rotate=chat.rotate
        )
        tokens, tiles = chat.view(facts.size, len(conversation.images))
        images.append(EncodedImage(ref.path, facts.digest, tokens, tiles))
    return tuple(images)


def _expand(
    ids: list[int], labels: list[int], images: tuple[EncodedImage, ...], chat: ChatFormat
) -> tuple[list[int], list[int]]:
    """Prepends the BOS token and replaces each image tag by the tokens of the image."""
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
