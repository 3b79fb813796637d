r"""A chat at the terminal, or from a pipe. Replies stream to stdout.

From a pipe line n of the output belongs to line n of the input: an empty one to an empty line, a
command and a message that could not be answered; the newlines of a reply are written as ``\n``.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft import console
from vlft.data.conversation import Conversation
from vlft.data.records import BOM
from vlft.data.special_tokens import warn_of_special_tokens
from vlft.errors import LONE_SURROGATE, DataError, VlftError
from vlft.inference.dialogue import Dialogue, without_tag
from vlft.inference.generate import Sampling, generate_replies
from vlft.inference.streaming import ConsoleStreamer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TextIO

    from vlft.data.conversation import Turn
    from vlft.data.encode import EncodedSample
    from vlft.families.processor import Processor


def chat(
    model: Any,
    processor: Processor,
    sampling: Sampling,
    *,
    system: str | None,
    lines: TextIO,
    switch: Callable[[bool], Any] | None = None,
    allow_private: bool = False,
) -> None:
    """Answers each line until the last or ``/exit``; an error is shown and the chat goes on.

    Args:
        model: of ``load``.
        processor: of ``load``.
        sampling: how replies are generated.
        system: system prompt, empty for none; None for the family's.
        lines: what is asked, and commands.
        switch: the model with its adapter, or without; None if it has none that can be switched.
        allow_private: whether images are downloaded from addresses that are not public.

    Raises:
        VlftError: at the end, if a line from a pipe led to an error.
    """
    tag = processor.family.image_tag
    with tempfile.TemporaryDirectory(prefix="vlft-chat-") as folder:
        rotate = processor.pixels.rotate
        system = without_tag(system, tag)
        dialogue = Dialogue(tag, Path(folder), rotate, allow_private, system)
        _Chat(model, processor, sampling, dialogue, switch, lines.isatty()).talk(lines)


@dataclass
class _Chat:
    """A chat; see ``chat`` for the fields."""

    model: Any
    processor: Processor
    sampling: Sampling
    dialogue: Dialogue
    switch: Callable[[bool], Any] | None
    interactive: bool

    def talk(self, lines: TextIO) -> None:
        """Answers all lines."""
        count = failed = 0
        for raw in _prompts(lines, interactive=self.interactive):
            count += 1
            try:
                if not self._take(_text(raw)):
                    break
            except VlftError as error:
                failed += 1
                console.show_error(str(error) if self.interactive else f"line {count}: {error}")
                self._end_line()
        if failed and not self.interactive:
            raise VlftError(
                f"{failed} of {count} lines led to an error",
                place="chat",
                hint="their lines of the output are empty",
            )

    def _take(self, line: str) -> bool:
        """Carries out a command or answers a message; returns whether the chat goes on."""
        if line == "/regenerate":
            turn, reply = self.dialogue.take_back()
            if not self._answer(turn):
                self.dialogue.turns += [turn, reply]
        elif line.startswith("/adapter"):
            self._switch(line.removeprefix("/adapter").strip())
            self._end_line()
        elif line.startswith("/") or not line:
            if line and not self.dialogue.run_command(line):
                return False
            self._end_line()
        else:
            self._answer(self.dialogue.message(line))
        return True

    def _answer(self, turn: Turn) -> bool:
        """Replies to a turn; returns whether it is part of the dialogue now."""
        dialogue = self.dialogue
        prompt = self.processor.encode_conversation(
            Conversation((*dialogue.turns, turn), dialogue.system)
        )
        dialogue.warned = dialogue.warned or warn_of_special_tokens([("", prompt.as_text)])
        reply = self._stream_reply(prompt)
        if reply is not None:
            dialogue.remember(turn, reply)
        return reply is not None

    def _switch(self, given: str) -> None:
        if given not in ("on", "off"):
            raise DataError(f"found {given!r}, on or off is allowed", place="/adapter")
        if self.switch is None:
            hint = "start the chat with --ckpt-dir and an adapter"
            raise DataError("the model has no adapter that can be switched", hint=hint)
        self.model = self.switch(given == "on")
        console.info("the tuned model replies" if given == "on" else "the base replies")

    def _end_line(self) -> None:
        """Writes the line of the output that belongs to a line from a pipe without a reply."""
        if not self.interactive:
            console.reply("\n")

    def _stream_reply(self, prompt: EncodedSample) -> str | None:
        """The reply, printed as it is generated; after Ctrl-C at a terminal its start, or None."""
        sampling = self.sampling
        asked = self.model, self.processor, [prompt], sampling
        streamer = ConsoleStreamer(self.processor, sampling.stop, one_line=not self.interactive)
        try:
            if sampling.num_beams > 1:  # Which tokens a reply has is known once all have ended.
                reply = generate_replies(*asked)[0]
                streamer.show(reply.token_ids)
                return reply.text
            return generate_replies(*asked, streamer)[0].text
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            streamer.end()
            return streamer.text or None


def _text(line: str | bytes) -> str:
    """The text of a line, without surrounding white space and byte order mark.

    Raises:
        DataError: it is not UTF-8.
    """
    hint = "save or type the text as UTF-8"
    if isinstance(line, bytes):
        try:
            line = line.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 (byte {error.start})", hint=hint) from None
    wrong = LONE_SURROGATE.search(line) or re.search("\0", line)
    if wrong:
        raise DataError(f"not UTF-8 (found {wrong[0]!a})", hint=hint)
    return line.strip().lstrip(BOM).strip()


def _prompts(lines: TextIO, *, interactive: bool) -> Iterator[str | bytes]:
    """The lines; at a terminal those that are not blank, until Ctrl-C or Ctrl-D."""
    if not interactive:
        yield from getattr(lines, "buffer", lines)
        return
    console.info("/help lists the commands; Ctrl-C ends a reply, Ctrl-D the chat")
    while True:
        try:
            line = console.err.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            console.info("")
            return
        except UnicodeDecodeError as error:
            yield error.object
            continue
        if line:
            yield line
