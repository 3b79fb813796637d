"""Conversations -> token ids and labels. The one function for training and inference alike.

conversation --family--> pieces of chat text, their trained spans --tokenizer--> ids, labels
             --image tags replaced by the tokens of the images--> EncodedSample
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vlft.data.download import downloaded
from vlft.data.images import inspect_image
from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tokenizers import Tokenizer
    from torch import Tensor

    from vlft.data.conversation import Conversation, ImageFacts, ImageRef
    from vlft.data.special_tokens import SpecialTokens

IGNORE = -100
# Added to the ids of a reply's tokens where they must differ from those of a prompt.
REPLY = 1 << 30


# (across, down): the grid of tiles in addition to the view of the whole image.
Tiles = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """Chat text that is tokenised on its own, with a tag for each image.

    Attributes:
        trained: (start, end) of its trained spans, in characters.
    """

    text: str
    trained: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ChatText:
    """A conversation as text.

    Attributes:
        text: the official chat text, to be shown.
        pieces: what is tokenised, in order.
    """

    text: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class ChatFormat:
    """What turns a conversation of one checkpoint into token ids.

    Attributes:
        write: (conversation, this format) -> its chat text.
        template: Jinja source of the chat template; empty if there is none.
        tokenizer: of the checkpoint; adds no special tokens by itself.
        roles: names of user and assistant in the chat text.
        system_prompt: default, for conversations whose own is None.
        image_tag: a single token that stands for an image in the chat text.
        image_token_id: id of the tag.
        image_border: ids before and after the tokens of each image; may be empty.
        draws: whether a reply may be an image.
        view: ((width, height) of an image, number of images in the conversation) -> (number of
            its tokens, its tiles).
        rotate: whether an image is turned by its EXIF orientation.
        bos_id: first token of every sample.
        eos_token: end-of-sentence token, which ends a reply.
        pad_id: for left padding of plain batches.
        ngram_exempt: ids that may repeat although n-grams within a window must not.
        special: the tokenizer's special tokens, if those in texts of a conversation are plain text;
            None if they are tokens, as in the authors' code.
        window: of the replies, see EncodedSample.
        check: raises DataError for a conversation that the chat text has no form for; None if it
            has one for all.
    """

    write: Callable[[Conversation, ChatFormat], ChatText]
    template: str
    tokenizer: Tokenizer
    roles: tuple[str, str]
    system_prompt: str
    image_tag: str
    image_token_id: int
    image_border: tuple[tuple[int, ...], tuple[int, ...]]
    view: Callable[[tuple[int, int], int], tuple[int, Tiles]]
    rotate: bool
    bos_id: int
    eos_token: str
    eos_id: int
    pad_id: int
    ngram_exempt: tuple[int, ...] = ()
    draws: bool = False
    special: SpecialTokens | None = None
    window: int | None = None
    check: Callable[[Conversation], None] | None = None


@dataclass(frozen=True)
class EncodedImage:
    """An image of an encoded sample.

    Attributes:
        digest: see ImageFacts.
        tokens: number of its tokens in the sequence.
        tiles: see Tiles; (0, 0) in families without tiles.
        drawn: whether it is the reply. Its tokens are then its codes but the last, which is
            predicted and never read.
    """

    path: Path
    digest: str
    tokens: int
    tiles: Tiles = (0, 0)
    drawn: bool = False

    @property
    def codes(self) -> int:
        """Number of its codes if it is drawn, else 0."""
        return self.tokens + 1 if self.drawn else 0

    @property
    def key(self) -> str:
        """Equal for images with equal features: the same file, cut into tiles the same way."""
        across, down = self.tiles
        if self.drawn:
            return f"{self.digest}/codes"
        return self.digest if self.tiles == (0, 0) else f"{self.digest}/{across}x{down}"


@dataclass(frozen=True)
class EncodedSample:
    """A sample as the model gets it, without pixels.

    Attributes:
        input_ids: (T,) int64; an image is a run of image tokens.
        labels: (T,) int64; the token's id where it is trained, -100 elsewhere. The codes of a drawn
            image are trained without labels, as they are not known yet.
        text: the official chat text, image tags not expanded.
        images: in the order of their tokens; a drawn one is the last.
        as_text: the special tokens that its texts held, which were read as plain text.
        window: tokens of its own reply, itself included, that a token of the reply attends to
            besides the prompt; None for all.
    """

    input_ids: Tensor
    labels: Tensor
    text: str
    images: tuple[EncodedImage, ...]
    as_text: tuple[str, ...] = ()
    window: int | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens before the first trained one."""
        return int(torch.cumsum(self.labels != IGNORE, 0).eq(0).sum())

    @property
    def drawn(self) -> EncodedImage | None:
        """The image that the reply is, if it is one."""
        return next((image for image in self.images if image.drawn), None)


def encode(conversation: Conversation, chat: ChatFormat) -> EncodedSample:
    """The ids and labels of a conversation; one that ends with the user is a prompt for a reply.

    Every reply that is to be trained is, with its end-of-sentence token.
    """
    special, as_text = chat.special, tuple[str, ...]()
    if special is not None:
        conversation, as_text = special.hide(conversation)
    written = chat.write(conversation, chat)
    ids, labels = list[int](), list[int]()
    for piece in written.pieces:
        tokens, offsets = tokenize(piece.text, chat, masked=bool(as_text))
        ids += tokens
        labels += [
            token if _inside(start, piece.trained) and token != chat.image_token_id else IGNORE
            for token, (start, _) in zip(tokens, offsets, strict=True)
        ]
    images = _view_images(conversation, chat)
    tags = ids.count(chat.image_token_id)
    if tags != len(images):
        raise DataError(
            f"{tags} {chat.image_tag} in the chat text, {len(images)} images in the conversation",
            place=conversation.place,
        )
    ids, labels = _expand(ids, labels, images, chat)
    # Python lists until here: on so few elements, tensor operations would cost more time.
    text = special.shown(written.text) if special is not None and as_text else written.text
    return EncodedSample(
        torch.tensor(ids), torch.tensor(labels), text, images, as_text, chat.window
    )


def tokenize(
    text: str, chat: ChatFormat, *, masked: bool = False
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text, and (start, end) of each in characters.

    ``masked`` if it holds special tokens that are plain text, see special_tokens.py.
    """
    if masked and chat.special is not None:
        return chat.special.tokenize(text)
    encoding = chat.tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def facts_of(ref: ImageRef, chat: ChatFormat, place: str) -> ImageFacts:
    """The facts about an image of the record at a place.

    The file is opened only if they are not known yet, as for records given through Python.

    Raises:
        DataError: it cannot be read.
    """
    return ref.facts or inspect_image(downloaded(ref), place=place, rotate=chat.rotate)


def _view_images(conversation: Conversation, chat: ChatFormat) -> tuple[EncodedImage, ...]:
    """The images of a conversation with what they become, in order."""
    images = []
    for ref in conversation.images:
        facts = facts_of(ref, chat, conversation.place)
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


def _inside(position: int, spans: tuple[tuple[int, int], ...]) -> bool:
    index = bisect_right(spans, position, key=lambda span: span[0]) - 1
    return index >= 0 and position < spans[index][1]
