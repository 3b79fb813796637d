"""What a data set needs of a checkpoint: samples, and what is known of them before tokenising."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vlft.data.conversation import Conversation, Turn
from vlft.data.drawing import drawn_image, encode_sample
from vlft.data.encode import EncodedImage
from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vlft.data.conversation import ImageFacts
    from vlft.data.encode import ChatFormat, EncodedSample

# Pre-tokenizers of tokenizer.json that add no character by themselves.
SPLITTERS = {"ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"}


@dataclass(frozen=True)
class Extent:
    """What bounds the number of a conversation's tokens.

    Attributes:
        size: bytes of its texts, the system prompt included.
        turns: number of its turns.
        has_system: whether it has a system prompt of its own.
    """

    size: int
    turns: int
    has_system: bool


class Encoder(Protocol):
    """Encodes conversations as samples for one checkpoint.

    Attributes:
        image_token_id: marks the tokens that are images.
    """

    image_token_id: int

    def encode(self, conversation: Conversation) -> EncodedSample:
        """Token ids and labels of a conversation."""

    def image(
        self, path: Path, facts: ImageFacts, count: int, *, drawn: bool = False
    ) -> EncodedImage:
        """An image, one of ``count`` in its conversation; its reply if it is ``drawn``."""

    def check(self, conversation: Conversation) -> None:
        """Raises DataError if the chat text has no form for the conversation."""

    def as_text(self, conversation: Conversation) -> tuple[str, ...]:
        """The special tokens in its texts that are read as plain text."""

    def most_tokens(self, extent: Extent, images: Sequence[EncodedImage]) -> int | None:
        """An upper bound of a conversation's token count; None if there is none."""

    def lengths(self, conversations: Sequence[Conversation]) -> list[int]:
        """The token count of each conversation, computed without labels and tensors."""

    @property
    def fingerprint(self) -> str:
        """A digest that is equal for encoders that give the same lengths."""


class ChatEncoder:
    """The encoder of a chat format."""

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat
        self.image_token_id = chat.image_token_id

    def encode(self, conversation: Conversation) -> EncodedSample:
        """Token ids and labels of a conversation; see ``data.encode``."""
        return encode_sample(conversation, self._chat)

    def image(
        self, path: Path, facts: ImageFacts, count: int, *, drawn: bool = False
    ) -> EncodedImage:
        """An image, one of ``count`` in its conversation; its reply if it is ``drawn``."""
        if drawn:
            return drawn_image(path, facts, self._chat)
        tokens, tiles = self._chat.view(facts.size, count)
        return EncodedImage(path, facts.digest, tokens, tiles)

    def check(self, conversation: Conversation) -> None:
        """Raises DataError if the chat text has no form for the conversation."""
        if conversation.drawn is not None and not self._chat.draws:
            found = "the reply is an image, and models of this family do not draw"
            hint = "use Janus, or drop such records with --on-bad-sample skip"
            raise DataError(found, place=conversation.place, hint=hint)
        if self._chat.check is not None:
            self._chat.check(conversation)

    def as_text(self, conversation: Conversation) -> tuple[str, ...]:
        """The special tokens in its texts that are read as plain text."""
        special = self._chat.special
        return () if special is None else special.found_in(conversation)

    def most_tokens(self, extent: Extent, images: Sequence[EncodedImage]) -> int | None:
        """More tokens a conversation cannot have: each token covers a byte, or is of an image."""
        if self._frame is None:
            return None
        base, per_exchange, system = self._frame
        text = extent.size + (0 if extent.has_system else system)
        border = sum(map(len, self._chat.image_border))
        seen = sum(image.tokens + border for image in images)
        return base + per_exchange * ((extent.turns + 1) // 2) + text + seen

    def lengths(self, conversations: Sequence[Conversation]) -> list[int]:
        """Tokens of each conversation, tokenised on several threads."""
        chat = self._chat
        if any(item.drawn is not None or self.as_text(item) for item in conversations):
            return [len(self.encode(item)) for item in conversations]
        written = [chat.write(item, chat).pieces for item in conversations]
        texts = [piece.text for pieces in written for piece in pieces]
        found = chat.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        counts = iter([len(encoding) for encoding in found])
        border = sum(map(len, chat.image_border))
        made = []
        for item, pieces in zip(conversations, written, strict=True):
            images = [
                self.image(ref.path, ref.facts, len(item.images))
                for ref in item.images
                if ref.facts
            ]
            # One more for BOS; the tag of an image is one token of the text.
            text = 1 + sum(next(counts) for _ in pieces) - len(images)
            made.append(text + sum(image.tokens + border for image in images))
        return made

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the tokenizer and of the chat text."""
        chat = self._chat
        digest = hashlib.sha256(chat.tokenizer.to_str().encode())
        parts = [chat.write.__qualname__, chat.write.__module__, chat.template, *chat.roles]
        parts += [chat.system_prompt, chat.image_tag, chat.eos_token]
        parts += [str(chat.image_border), str(chat.special is None)]
        views = [chat.view(size, count) for size in PROBES for count in (1, 2, 3)]
        digest.update(repr((parts, views)).encode())
        return digest.hexdigest()

    @functools.cached_property
    def _frame(self) -> tuple[int, int, int] | None:
        """Bytes of the chat text around the texts: at its ends, of an exchange, default system.

        None if the tokenizer may give more tokens than bytes.
        """
        if not _covers_bytes(json.loads(self._chat.tokenizer.to_str())):
            return None
        one = self._written(1)
        try:
            two = self._written(2)
        except DataError:
            # This family knows one question and one reply, without history.
            two = 2 * one
        # BOS is added beside the tokens of the text.
        return one + 1, max(two - one, 0), len(self._chat.system_prompt.encode())

    def _written(self, exchanges: int) -> int:
        """Bytes of the chat text of some exchanges of one letter each, without a system prompt."""
        turns = (Turn("user", ("a",)), Turn("assistant", ("b",)))
        item = Conversation(turns * exchanges, "")
        text = sum(len(piece.text.encode()) for piece in self._chat.write(item, self._chat).pieces)
        return text + len(SEPARATION)


# The separator between a system prompt and the first turn.
SEPARATION = "\n\n"
# Sizes of images that families with tiles cut differently.
PROBES = ((1, 1), (384, 384), (500, 300), (2000, 1000), (1000, 3000))


def _covers_bytes(tokenizer: Any) -> bool:
    """Whether every token of a tokenizer.json covers at least one byte of the text."""
    normalizer, model = tokenizer.get("normalizer"), tokenizer.get("model") or {}
    is_same = normalizer is None or normalizer.get("normalizers") == []
    splitter = tokenizer.get("pre_tokenizer")
    parts = (splitter or {}).get("pretokenizers") or [splitter or {}]
    adds_nothing = all(
        part.get("type") in SPLITTERS and not part.get("add_prefix_space") for part in parts
    )
    return is_same and adds_nothing and model.get("type") == "BPE"
