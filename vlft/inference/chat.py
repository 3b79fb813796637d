r"""A chat at the terminal, or from a pipe. Replies stream to stdout.

From a pipe line n of the output belongs to line n of the input: an empty one to an empty line, a
command and a message that could not be answered; the newlines of a reply are written as ``\n``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.generation.streamers import BaseStreamer

from vlft import console
from vlft.data.conversation import Conversation, ImageRef, Turn
from vlft.data.images import inspect_image
from vlft.errors import DataError, VlftError
from vlft.inference.generate import Sampling, generate_replies

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from vlft.families.processor import Processor

HELP = """\
/image PATH   attach an image to the next message
/system TEXT  start a new dialogue with this system prompt
/clear        start a new dialogue
/help         show these lines
/exit         leave (Ctrl-D does too); Ctrl-C ends a reply"""


@dataclass
class _Dialogue:
    """The state of a chat: system prompt (None: the family's), turns so far, images attached."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    images: list[ImageRef] = field(default_factory=list)

    def run_command(self, line: str) -> bool:
        """Carries out a /command; returns whether the chat goes on."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/exit":
            return False
        if name == "/help":
            console.info(HELP)
        elif name == "/clear":
            self.turns, self.images = [], []
        elif name == "/system":
            self.system, self.turns = argument, []
        elif name == "/image":
            self._attach(argument)
        else:
            raise DataError(f"no command {name}", hint="/help lists the commands")
        return True

    def _attach(self, given: str) -> None:
        # A terminal puts quotes around a file that is dropped into it.
        path = Path(given.strip("'\"")).expanduser()
        try:
            facts = inspect_image(path)
        except DataError as error:
            hint = "relative paths start at the working directory"
            raise DataError(error.message, place=error.place, hint=hint) from None
        self.images.append(ImageRef(path, given, facts))
        width, height = facts.size
        console.info(
            f"attached {path.name}, {width} x {height} pixels; "
            f"images of the next message: {len(self.images)}"
        )


class _ConsoleStreamer(BaseStreamer):  # type: ignore[misc]
    """Prints a reply as it is generated, each character once all of its bytes are there."""

    def __init__(self, processor: Processor, *, one_line: bool) -> None:
        self._processor = processor
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
        self._show(self._processor.decode(self._ids).rstrip("\ufffd"))

    def end(self) -> None:
        """Prints the bytes held back and ends the line."""
        self._show(self._processor.decode(self._ids))
        console.reply("\n")

    def _show(self, text: str) -> None:
        if text.startswith(self.text):
            new = text[len(self.text) :]
            self.text = text
            console.reply(new.replace("\n", "\\n") if self._one_line else new)


def chat(
    model: Any, processor: Processor, sampling: Sampling, *, system: str | None, lines: TextIO
) -> None:
    """Answers each line until the last or ``/exit``; an error is shown and the chat goes on.

    Raises:
        VlftError: at the end, if a line from a pipe led to an error.
    """
    dialogue = _Dialogue(system)
    interactive = lines.isatty()
    count = failed = 0
    for line in _prompts(lines, interactive=interactive):
        count += 1
        try:
            if line.startswith("/") or not line:
                if line and not dialogue.run_command(line):
                    break
                _end_line(interactive)
                continue
            turns = (*dialogue.turns, Turn("user", (*dialogue.images, line)))
            conversation = Conversation(turns, dialogue.system)
            reply = _stream_reply(model, processor, sampling, conversation, interactive=interactive)
            if reply is not None:
                dialogue.turns = [*turns, Turn("assistant", (reply,))]
                dialogue.images = []
        except VlftError as error:
            failed += 1
            console.show_error(str(error) if interactive else f"line {count}: {error}")
            _end_line(interactive)
    if failed and not interactive:
        raise VlftError(
            f"{failed} of {count} lines led to an error",
            place="chat",
            hint="their lines of the output are empty",
        )


def _end_line(interactive: bool) -> None:
    """Writes the line of the output that belongs to a line from a pipe without a reply."""
    if not interactive:
        console.reply("\n")


def _stream_reply(
    model: Any,
    processor: Processor,
    sampling: Sampling,
    conversation: Conversation,
    *,
    interactive: bool,
) -> str | None:
    """The reply, printed as it is generated; after Ctrl-C at a terminal its start, or None."""
    streamer = _ConsoleStreamer(processor, one_line=not interactive)
    try:
        prompt = processor.encode_conversation(conversation)
        return generate_replies(model, processor, [prompt], sampling, streamer)[0].text
    except KeyboardInterrupt:
        if not interactive:
            raise
        streamer.end()
        return streamer.text or None


def _prompts(lines: TextIO, *, interactive: bool) -> Iterator[str]:
    """The lines; at a terminal those that are not blank, until Ctrl-C or Ctrl-D."""
    if not interactive:
        yield from (line.strip() for line in lines)
        return
    console.info("/help lists the commands; Ctrl-C ends a reply, Ctrl-D the chat")
    while True:
        try:
            line = console.err.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            console.info("")
            return
        if line:
            yield line
