"""Conversations -> conversations of at most max_length tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlft.data.encode import outline
from vlft.errors import DataError

if TYPE_CHECKING:
    from vlft.data.conversation import Conversation
    from vlft.data.encode import EncodedSample, Outline
    from vlft.data.options import DataOptions, Encode


def fit(
    conversation: Conversation, encode: Encode, options: DataOptions
) -> tuple[Conversation, Outline] | None:
    """The conversation, cut to max_length if allowed, and its outline; None to skip it.

    For inference only the prompt is measured, because the reply is a label and no input.
    """
    needed = conversation if options.reading.need_response else conversation.without_reply()
    limit, sample = options.max_length, encode(needed)
    if limit is None or len(sample) <= limit:
        return conversation, outline(sample, options.image_token_id)
    if options.on_long == "skip":
        return None
    if options.on_long == "truncate-history":
        fitted = _truncated(conversation, encode, limit)
        if fitted is not None:
            return fitted[0], outline(fitted[1], options.image_token_id)
    remedy = "raise --max-length, or use --on-long skip"
    if options.model_length is not None and len(sample) > options.model_length:
        longest = options.model_length
        remedy = f"the model takes at most {longest}; shorten it, or use --on-long skip"
    hint = f"{remedy} or truncate-history"
    if options.on_long == "truncate-history":
        hint = f"it is too long even without its history; {remedy}"
    if not options.reading.need_response:
        hint = "shorten it, or leave such records out with --on-bad-sample skip"
    raise DataError(
        f"{len(sample)} tokens, at most {limit} are allowed", place=conversation.place, hint=hint
    )


def _truncated(
    conversation: Conversation, encode: Encode, limit: int
) -> tuple[Conversation, EncodedSample] | None:
    """The conversation without the fewest first exchanges that make it fit, and its sample.

    None if it is too long even with the last exchange alone. Found by bisection, because rendering
    and tokenising a long conversation once per exchange takes minutes.
    """
    low, high = 1, (len(conversation.turns) - 1) // 2
    best: tuple[Conversation, EncodedSample] | None = None
    while low <= high:
        dropped = (low + high) // 2
        shorter = conversation.without_first_exchanges(dropped)
        sample = encode(shorter)
        if len(sample) <= limit:
            best, high = (shorter, sample), dropped - 1
        else:
            low = dropped + 1
    return best
