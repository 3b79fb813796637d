r"""A chat at the terminal, or from a pipe. Replies stream to stdout.

From a pipe line n of the output belongs to line n of the input: an empty one to an empty line, a
command and a message that could not be answered; the newlines of a reply are written as ``\n``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from transformers.generation.streamers import BaseStreamer

from vlft import console
from vlft.data.conversation import Conversation, ImageRef, Turn
from vlft.data.images import inspect_image
from vlft.data.layouts.place import COMMON_TAG, place_in_text
from vlft.data.records import BOM
from vlft.data.special_tokens import warn_of_special_tokens
from vlft.errors import LONE_SURROGATE, DataError, VlftError, shown
from vlft.files import expand_home
from vlft.inference.generate import Sampling, generate_replies

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from vlft.data.encode import EncodedSample
    from vlft.families.processor import Processor

HELP = """\
/image PATH   attach an image to the next message
/system TEXT  start a new dialogue with this system prompt
/clear        start a new dialogue
/help         show these lines
/exit         leave (Ctrl-D does too); Ctrl-C ends a reply"""


@dataclass
class _Dialogue:
    """The state of a chat: system prompt (None: the family's), turns so far, images attached.

    ``folder`` holds a copy of each image, so that it is the same in all turns to come. ``rotate``
    says whether images are turned by EXIF.
    """

    image_tag: str
    folder: Path
    rotate: bool
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    images: list[ImageRef] = field(default_factory=list)
    warned: bool = False

    def run_command(self, typed: str) -> bool:
        """Carries out a /command; returns whether the chat goes on."""
        name, _, argument = typed.partition(" ")
        argument = argument.strip()
        if name == "/exit":
            return False
        if name == "/help":
            for line in HELP.splitlines():
                console.info(line)
        elif name == "/clear":
            self.turns, self.images = [], []
        elif name == "/system":
            self.system, self.turns = _without_tag(argument, self.image_tag), []
        elif name == "/image":
            for path in _image_paths(argument):
                self._attach(path)
        else:
            raise DataError(f"no command {name}", hint="/help lists the commands")
        return True

    def message(self, text: str) -> Turn:
        """The user's next turn, with images at their tags, or at the start if there are no tags."""
        try:
            return place_in_text(text, self.images, self.image_tag)
        except DataError:
            raise DataError(
                f"images attached: {len(self.images)}, the message has another number of "
                f"{COMMON_TAG}",
                hint="/image PATH attaches an image; without a tag images start the message",
            ) from None

    def remember(self, turn: Turn, reply: str) -> None:
        """Adds a turn and its reply without image tags, for which there would be no images."""
        while self.image_tag in reply:
            reply = reply.replace(self.image_tag, "")
        self.turns += [turn, Turn("assistant", (reply,))]
        self.images = []

    def _attach(self, path: Path) -> None:
        copy = self.folder / f"{len(list(self.folder.iterdir()))}{path.suffix}"
        hint = "name another image"
        try:
            if path.exists() and not path.is_file():
                raise DataError("not a file")
            shutil.copyfile(path, copy)
            facts = inspect_image(copy, rotate=self.rotate)
        except DataError as error:
            raise DataError(error.message, place=shown(path), hint=hint) from None
        except OSError as error:
            found = f"cannot be read ({error.strerror or error})"
            if isinstance(error, FileNotFoundError):
                found, hint = "no such image", "relative paths start at the working directory"
            raise DataError(found, place=shown(path), hint=hint) from None
        self.images.append(ImageRef(copy, str(path), facts))
        width, height = facts.size
        console.info(
            f"attached {path.name}, {width} x {height} pixels; "
            f"images of the next message: {len(self.images)}"
        )


def _image_paths(given: str) -> list[Path]:
    """The files that a text after /image means: as it is, or as a shell or a terminal writes them.

    A terminal writes a file that is dropped into it with quotes, with backslashes or as a URL.
    """
    if not given:
        raise DataError("/image without a path", hint="write /image PATH")
    if re.match(r"(?!file:)\w+://|data:", given):
        raise DataError(
            f"found {given[:60]!r} as an image; local files are allowed",
            hint="download the image, then write /image PATH",
        )
    words = [given]
    if given.startswith("file:"):
        words = [unquote(urlsplit(given).path)]
    elif not os.path.exists(expand_home(given)):  # noqa: PTH110 (False for a name that is too long)
        with suppress(ValueError):
            words = shlex.split(given) or words
            if not all(os.path.exists(expand_home(word)) for word in words[1:]):  # noqa: PTH110
                words = [given]
    return [Path(expand_home(word)) for word in words]


def _without_tag(system: str | None, image_tag: str) -> str | None:
    """A system prompt that can be used.

    Raises:
        DataError: it holds an image tag.
    """
    for tag in (COMMON_TAG, image_tag):
        if system and tag in system:
            raise DataError(f"found {tag} in the system prompt", hint="/image PATH attaches images")
    return system


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
    tag = processor.family.image_tag
    with tempfile.TemporaryDirectory(prefix="vlft-chat-") as folder:
        rotate = processor.pixels.rotate
        dialogue = _Dialogue(tag, Path(folder), rotate, _without_tag(system, tag))
        _talk(model, processor, sampling, dialogue, lines)


def _talk(
    model: Any, processor: Processor, sampling: Sampling, dialogue: _Dialogue, lines: TextIO
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
    streamer = _ConsoleStreamer(processor, one_line=not interactive)
    try:
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
