"""Texts that end a reply, see ``--stop``: where they stand, and the criterion that sees them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteria

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

# Tokens without text that are expected among the last ones; with more the whole reply is read.
WITHOUT_TEXT = 32


def text_before(text: str, stops: Sequence[str]) -> str | None:
    """The part of a text before the first of some texts; None if it holds none of them."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else None


def certain_text(text: str, stops: Sequence[str]) -> str:
    """The part of a growing text that stays, however it goes on.

    What stands before a stop, or before an end that may become the start of one.
    """
    before = text_before(text, stops)
    if before is not None:
        return before
    longest = max(map(len, stops), default=1)
    for place in range(max(0, len(text) - longest + 1), len(text)):
        if any(stop.startswith(text[place:]) for stop in stops):
            return text[:place]
    return text


class Stops(StoppingCriteria):  # type: ignore[misc]
    """Stops a reply whose text holds one of some texts, whatever tokens spell it.

    Args:
        prompt: length of the padded prompts, in tokens.
        rows: number of replies.
        texts: none of them empty; may be none.
        decode: the text of tokens, not stripped.

    Attributes:
        ends: the length at which each reply was stopped; None for those that were not.
    """

    def __init__(
        self, prompt: int, rows: int, texts: Sequence[str], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._prompt, self._texts, self._decode = prompt, texts, decode
        self._has_text = functools.cache(lambda token: bool(decode([token])))
        # A token has a byte of the text at least; one before them keeps the decoder from a start.
        self._most = max((len(text.encode()) for text in texts), default=0) + 1
        self.ends: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        """(R,), whether each row has ended; R is larger than the number of replies with beams."""
        candidates: list[int | None] = [None] * len(input_ids)
        found = self.ends if len(input_ids) == len(self.ends) else candidates
        if self._texts:
            replies = input_ids[:, self._prompt :].cpu()
            for row, reply in enumerate(replies):
                if found[row] is None and self._is_stopped(reply):
                    found[row] = len(reply)
        return torch.tensor([end is not None for end in found], device=input_ids.device)

    def _is_stopped(self, reply: Tensor) -> bool:
        """Whether the last token of a reply completes one of the texts."""
        last = self._last(reply[-self._most - WITHOUT_TEXT :])
        if len(last) < self._most:
            last = self._last(reply)
        return text_before(self._decode(last), self._texts) is not None

    def _last(self, reply: Tensor) -> list[int]:
        """The last tokens with a text, at most as many as the longest stop can have."""
        return [token for token in reply.tolist() if self._has_text(token)][-self._most :]
