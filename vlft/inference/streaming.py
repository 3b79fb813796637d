"""A reply that is printed while it is generated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.generation.streamers import BaseStreamer

from vlft import console
from vlft.inference.stops import certain_text, text_before

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlft.families.processor import Processor


class ConsoleStreamer(BaseStreamer):  # type: ignore[misc]
    r"""Prints a reply as it is generated, each character once all of its bytes are there.

    Args:
        processor: of the model.
        stops: texts that end a reply; what may become one of them is held back.
        one_line: whether newlines are written as ``\\n``.
    """

    def __init__(self, processor: Processor, stops: Sequence[str], *, one_line: bool) -> None:
        self._processor, self._stops = processor, stops
        self._one_line = one_line
        self._ids: list[int] = []
        self.text = ""
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Takes the prompt in the first call, then one token per call."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._ids += value.flatten().tolist()
        # A replacement character at the end stands for bytes whose successors are still to come.
        text = self._processor.reply_text(self._ids).rstrip("\ufffd")
        self._show(certain_text(text, self._stops).strip())

    def show(self, token_ids: Sequence[int]) -> None:
        """Prints a whole reply."""
        self._ids = list(token_ids)
        self.end()

    def end(self) -> None:
        """Prints what was held back and ends the line."""
        text = self._processor.reply_text(self._ids)
        before = text_before(text, self._stops)
        self._show((text if before is None else before).strip())
        console.reply("\n")

    def _show(self, text: str) -> None:
        if text.startswith(self.text):
            new = text[len(self.text) :]
            self.text = text
            console.reply(new.replace("\n", "\\n") if self._one_line else new)
