r"""A chat at the terminal, or from a pipe. Replies stream to stdout.

From a pipe line n of the output belongs to line n of the input: an empty one to an empty line, a
command and a message that could not be answered; the newlines of a reply are written as ``\n``.
"""

from __future__ import annotations

import re
import tempfile
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
    from collections.abc import Iterator
    from typing import TextIO

    from vlft.data.encode import EncodedSample
    from vlft.families.processor import Processor


def chat(
    model: Any, processor: Processor, sampling: Sampling, *, system: str | None, lines: TextIO
) -> None:
    """Answers each line until the last or ``/exit``; an error is shown and the chat goes on.

    Raises:
        VlftError: at the end, if a line from a pipe led to an error.
    """
    tag = processor.family.image_tag
    with tempfile.TemporaryDirectory(prefix="vlft-chat-") as folder:
        rotate = processor.pixels.rotate
        dialogue = Dialogue(tag, Path(folder), rotate, without_tag(system, tag))
        _talk(model, processor, sampling, dialogue, lines)


def _talk(
    model: Any, processor: Processor, sampling: Sampling, dialogue: Dialogue, lines: TextIO
) -> None:
    interactive = lines.isatty()
    count = failed = 0
    for raw in _prompts(lines, interactive=interactive):
        count += 1
        try:
            line = _text(raw)
            if line.startswith("/") or not line:
                if line and not dialogue.run_command(line):
                    break
                _end_line(interactive)
                continue
            turn = dialogue.message(line)
            conversation = Conversation((*dialogue.turns, turn), dialogue.system)
            prompt = processor.encode_conversation(conversation)
            dialogue.warned = dialogue.warned or warn_of_special_tokens([("", prompt.as_text)])
            reply = _stream_reply(model, processor, sampling, prompt, interactive=interactive)
            if reply is not None:
                dialogue.remember(turn, reply)
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
    prompt: EncodedSample,
    *,
    interactive: bool,
) -> str | None:
    """The reply, printed as it is generated; after Ctrl-C at a terminal its start, or None."""
    streamer = ConsoleStreamer(processor, sampling.stop, one_line=not interactive)
    try:
        if sampling.num_beams > 1:  # Which tokens a reply has is known once all have ended.
            reply = generate_replies(model, processor, [prompt], sampling)[0]
            streamer.show(reply.token_ids)
            return reply.text
        return generate_replies(model, processor, [prompt], sampling, streamer)[0].text
    except KeyboardInterrupt:
        if not interactive:
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
