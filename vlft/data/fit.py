"""Conversations -> those of at most max_length tokens, cut if that is allowed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vlft.console import tracked
from vlft.errors import DataError

if TYPE_CHECKING:
    from vlft.data.conversation import Conversation
    from vlft.data.encode import EncodedImage
    from vlft.data.encoder import Encoder
    from vlft.data.items import Items
    from vlft.data.options import DataOptions

# Conversations that are tokenised at once.
BATCH = 256
# Stands for an unknown length: the conversation was not tokenised.
UNKNOWN = -1


@dataclass(frozen=True)
class Fitted:
    """Which conversations of a data file are samples.

    Attributes:
        index: (S,) of each in the items of the file, in order.
        dropped: (S,) first exchanges that are left out.
        tokens: (S,) length, or UNKNOWN where no tokenising was needed.
        problems: by index, of those that cannot be samples.
        too_long: indices of those that are left out for their length.
    """

    index: Any
    dropped: Any
    tokens: Any
    problems: dict[int, DataError] = field(default_factory=dict)
    too_long: list[int] = field(default_factory=list)

    @property
    def is_all(self) -> bool:
        """Whether every conversation is a sample as it is."""
        return not (self.problems or self.too_long or self.dropped.any())


def fit_items(items: Items, encoder: Encoder, options: DataOptions) -> Fitted:
    """The conversations of a file that fit; only those that may not are tokenised."""
    count = len(items)
    if items.fitting is not None:
        return Fitted(np.arange(count, dtype=np.int32), np.zeros(count, np.int16), items.fitting)
    dropped, tokens = np.zeros(count, np.int16), np.full(count, UNKNOWN, np.int32)
    problems: dict[int, DataError] = {}
    too_long: list[int] = []
    doubtful = _doubtful(items, encoder, options)
    batches = [doubtful[start : start + BATCH] for start in range(0, len(doubtful), BATCH)]
    for batch in tracked(batches, "checking samples", len(batches)):
        for index, length in zip(batch, _lengths(batch, items, encoder, options), strict=True):
            if isinstance(length, DataError):
                problems[index] = length
            elif options.max_length is None or length <= options.max_length:
                tokens[index] = length
            else:
                try:
                    fitted = fit(items.conversation(index), encoder, options, length)
                except DataError as error:
                    problems[index] = error
                    continue
                if fitted is None:
                    too_long.append(index)
                else:
                    dropped[index], tokens[index] = fitted
    is_good = np.ones(count, bool)
    is_good[[*problems, *too_long]] = False
    return Fitted(
        np.flatnonzero(is_good).astype(np.int32), dropped[is_good], tokens[is_good],
        problems, too_long,
    )  # fmt: skip


def _doubtful(items: Items, encoder: Encoder, options: DataOptions) -> list[int]:
    """Indices of the conversations that may be too long."""
    limit = options.max_length
    if limit is None:
        return []
    seen: dict[tuple[int, int], EncodedImage] = {}
    found = []
    for index in range(len(items)):
        numbers = items.images_of(index)
        images = []
        for number in numbers:
            key = (number, len(numbers))
            if key not in seen:
                path = items.paths[number]
                seen[key] = encoder.image(path, items.facts(number), len(numbers))
            images.append(seen[key])
        most = encoder.most_tokens(items.extent(index), images)
        if most is None or most > limit:
            found.append(index)
    return found


def _lengths(
    batch: list[int], items: Items, encoder: Encoder, options: DataOptions
) -> list[int | DataError]:
    """Tokens of each conversation, or why it cannot be encoded."""
    needed = [items.conversation(index) for index in batch]
    if not options.reading.need_response:
        needed = [item.without_reply() for item in needed]
    try:
        return list(encoder.lengths(needed))
    except DataError as error:
        if len(batch) == 1:
            return [error]
        return [_lengths([index], items, encoder, options)[0] for index in batch]


def fit(
    conversation: Conversation, encoder: Encoder, options: DataOptions, length: int
) -> tuple[int, int] | None:
    """How many first exchanges a conversation that is too long loses, and its tokens then.

    None to leave it out.

    Args:
        conversation: of more than ``max_length`` tokens.
        encoder: of the checkpoint.
        options: see DataOptions.
        length: tokens of the conversation; for inference of its prompt, as the reply is no input.

    Raises:
        DataError: neither is allowed.
    """
    limit = options.max_length
    if options.on_long == "skip":
        return None
    if options.on_long == "truncate-history" and limit is not None:
        fitted = _truncated(conversation, encoder, limit)
        if fitted is not None:
            return fitted
    skip = f"{'give vlft sft' if options.is_check else 'use'} --on-long skip"
    remedy = f"raise --max-length, or {skip}"
    if options.model_length is not None and length > options.model_length:
        longest = options.model_length
        remedy = f"the model takes at most {longest}; shorten it, or {skip}"
    hint = f"{remedy} or truncate-history"
    if options.on_long == "truncate-history":
        hint = f"it is too long even without its history; {remedy}"
    if not options.reading.need_response:
        hint = "shorten it, or leave such records out with --on-bad-sample skip"
    raise DataError(
        f"{length} tokens, at most {limit} are allowed", place=conversation.place, hint=hint
    )


def _truncated(conversation: Conversation, encoder: Encoder, limit: int) -> tuple[int, int] | None:
    """The fewest first exchanges without which a conversation fits, and its tokens then.

    None if it is too long even with the last exchange alone. Found by bisection, because rendering
    and tokenising a long conversation once per exchange takes minutes.
    """
    low, high = 1, (len(conversation.turns) - 1) // 2
    best: tuple[int, int] | None = None
    while low <= high:
        dropped = (low + high) // 2
        (length,) = encoder.lengths([conversation.without_first_exchanges(dropped)])
        if length <= limit:
            best, high = (dropped, length), dropped - 1
        else:
            low = dropped + 1
    return best
