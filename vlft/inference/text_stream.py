"""Tokens of a reply -> pieces of its text that later tokens no longer change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlft.inference.stops import certain_text, text_before

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# The decoder's sign for bytes that are no whole character, maybe because some are still to come.
UNFINISHED = "\ufffd"


class TextStream:
    """The text of a reply, piece by piece; together the pieces are the text without outer space.

    Args:
        decode: tokens -> their text; that of two lists is that of the one and then of the other,
            if the first ends with a whole character.
        stop: the text ends before the first of these.

    Attributes:
        stopped: whether one of them was found.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, stop
        self._tokens: list[int] = []
        self._held = ""
        self._has_begun = False
        self.stopped = False

    def take(self, token_ids: Sequence[int]) -> str:
        """The piece that is certain with these tokens; it may be empty."""
        if self.stopped:
            return ""
        self._tokens += token_ids
        text = self._decode(self._tokens)
        if text.endswith(UNFINISHED):
            return ""
        self._tokens = []
        return self._certain(text)

    def end(self) -> str:
        """The last piece, once there are no more tokens."""
        piece = self._certain(self._decode(self._tokens)) if not self.stopped else ""
        self._tokens = []
        rest, self._held = self._held.rstrip(), ""
        return piece + (rest if self._has_begun else rest.lstrip())

    def _certain(self, text: str) -> str:
        self._held += text
        self.stopped = text_before(self._held, self._stop) is not None
        certain = certain_text(self._held, self._stop)
        rest = "" if self.stopped else self._held[len(certain) :]
        whole = certain if self._has_begun else certain.lstrip()
        # Space at the end may be the last.
        piece = whole.rstrip()
        self._has_begun = self._has_begun or bool(piece)
        self._held = "" if self.stopped else whole[len(piece) :] + rest
        return piece
