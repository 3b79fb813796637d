"""A chat at the terminal, or line by line from a pipe. Replies stream to stdout."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.generation.streamers import BaseStreamer

from vlft import console
from vlft.data.conversation import Conversation, ImageRef, Part, Turn
from vlft.data.images import inspect_image
from vlft.errors import DataError, VlftError
from vlft.inference.generate import Sampling, generate_replies

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vlft.families.processor import Processor

HELP = "/image PATH adds an image to the next message; /clear, /system TEXT, /exit"


@dataclass
class Session:
    """What the chat remembers.

    Attributes:
        system: None for the family's default.
        turns: of the dialogue so far.
        images: for the next message.
    """

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    images: list[ImageRef] = field(default_factory=list)

    def command(self, line: str) -> bool:
        """Carries a /command out; returns False to end the chat.

        Raises:
            DataError: there is no such command or image.
        """
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/exit":
            return False
        if name == "/clear":
            self.turns, self.images = [], []
        elif name == "/system":
            self.system, self.turns = rest, []
        elif name == "/image":
            self.images.append(ImageRef(Path(rest), rest, inspect_image(Path(rest))))
        else:
            raise DataError(f"no command {name}", hint=HELP)
        return True

    def ask(self, text: str) -> Conversation:
        """The dialogue with the next message."""
        parts: tuple[Part, ...] = (*self.images, text)
        return Conversation((*self.turns, Turn("user", parts)), self.system)

    def remember(self, asked: Conversation, reply: str) -> None:
        """Adds the message and its reply to the dialogue."""
        self.turns = [*asked.turns, Turn("assistant", (reply,))]
        self.images = []


class ConsoleStreamer(BaseStreamer):  # type: ignore[misc]
    """Prints a reply while it grows; text appears once its characters are whole.

    Args:
        processor: decodes.
    """

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._ids: list[int] = []
        self._shown = ""
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Takes the prompt first, then one token at a time."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._ids += value.flatten().tolist()
        # A trailing replacement mark is a character whose other bytes are still to come.
        self._show(self._processor.decode(self._ids).rstrip("\ufffd"))

    def end(self) -> None:
        """Shows what was held back and ends the line."""
        self._show(self._processor.decode(self._ids))
        console.reply("\n")

    def _show(self, text: str) -> None:
        if text.startswith(self._shown):
            console.reply(text[len(self._shown) :])
            self._shown = text


def chat(
    model: Any,
    processor: Processor,
    sampling: Sampling,
    *,
    system: str | None,
    lines: Any,
) -> None:
    """Answers line after line until they end or ``/exit``; a mistake is said and left behind."""
    session = Session(system)
    interactive = bool(getattr(lines, "isatty", lambda: False)())
    if interactive:
        console.info(HELP)
    for line in _prompts(lines, interactive=interactive):
        try:
            if line.startswith("/"):
                if not session.command(line):
                    return
                continue
            asked = session.ask(line)
            prompt = processor.encode_conversation(asked)
            replies = generate_replies(
                model, processor, [prompt], sampling, ConsoleStreamer(processor)
            )
            session.remember(asked, replies[0].text)
        except VlftError as error:
            console.show_error(str(error))


def _prompts(lines: Iterable[str], *, interactive: bool) -> Iterator[str]:
    """The lines that are not blank; at a terminal with a prompt before each."""
    if not interactive:
        yield from (line.strip() for line in lines if line.strip())
        return
    while True:
        try:
            line = console.err.input("[bold]> [/bold]").strip()
        except EOFError:
            return
        if line:
            yield line
