"""The state of a chat, and its commands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vlft import console
from vlft.data.conversation import ImageRef, Turn, flat_text
from vlft.data.download import ADDRESS, Limits, fetch_image
from vlft.data.images import inspect_image
from vlft.data.layouts.place import COMMON_TAG, place_in_text
from vlft.errors import DataError, shown
from vlft.files import expand_home, json_text

HELP = """\
/image PATH   attach an image, or several, to the next message; a web address will do
/system TEXT  start a new dialogue with this system prompt
/clear        start a new dialogue
/regenerate   reply to the last message again
/adapter off  let the base reply; on: the tuned model again
/save PATH    add the dialogue to a .jsonl file, as a record to train on
/help         show these lines
/exit         leave (Ctrl-D does too); Ctrl-C ends a reply"""
# A user waits at the prompt, so a slow download of an image is given up sooner than in training.
LIMITS = Limits(size=64 * 2**20, silence=10, total=60, attempts=2)


@dataclass
class Dialogue:
    """The state of a chat: system prompt (None: the family's), turns so far, images attached.

    ``folder`` holds a copy of each image, so that it is the same in all turns to come. ``rotate``
    says whether images are turned by EXIF, ``allow_private`` whether they are downloaded from
    addresses that are not public.
    """

    image_tag: str
    folder: Path
    rotate: bool
    allow_private: bool = False
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
            self.system, self.turns = without_tag(argument, self.image_tag), []
        elif name == "/image":
            for given in _images(argument):
                self._attach(given)
        elif name == "/save":
            self._save(argument)
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

    def take_back(self) -> tuple[Turn, Turn]:
        """The last turn and its reply, which are no longer part of the dialogue.

        Raises:
            DataError: there is none.
        """
        if not self.turns:
            raise DataError("no message to reply to again", hint="write one first")
        turn, reply = self.turns[-2:]
        del self.turns[-2:]
        return turn, reply

    def _save(self, given: str) -> None:
        """Adds the dialogue to a file, in the layout of training data.

        Raises:
            DataError: there is no dialogue, or the file cannot be written.
        """
        path = Path(expand_home(given))
        if path.suffix != ".jsonl":
            raise DataError(f"found {given!r}", place="/save", hint="write /save NAME.jsonl")
        if not self.turns:
            raise DataError("there is no dialogue yet", place="/save")
        if path.exists() and not path.is_file():
            raise DataError("not a regular file", place=shown(path), hint="name another file")
        texts = [flat_text(turn, COMMON_TAG) for turn in self.turns]
        *history, (query, response) = zip(texts[::2], texts[1::2], strict=True)
        images = [i for turn in self.turns for i in turn.parts if isinstance(i, ImageRef)]
        row = {
            "query": query,
            "response": response,
            **({"history": history} if history else {}),
            **({"images": [image.given for image in images]} if images else {}),
            **({} if self.system is None else {"system": self.system}),
        }
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json_text(row) + "\n")
        except OSError as error:
            found = f"cannot be written ({error.strerror or error})"
            raise DataError(found, place=shown(path), hint="name another file") from None
        console.info(f"added a record of {len(self.turns) // 2} turns to {shown(path)}")

    def _attach(self, given: str) -> None:
        path = Path(given)
        copy = self.folder / f"{len(list(self.folder.iterdir()))}{path.suffix}"
        hint = "name another image"
        try:
            if ADDRESS.match(given):
                fetch_image(given, copy, allow_private=self.allow_private, limits=LIMITS)
            elif path.exists() and not path.is_file():
                raise DataError("not a file")
            else:
                shutil.copyfile(path, copy)
            facts = inspect_image(copy, rotate=self.rotate)
        except DataError as error:
            hint = error.hint if "--allow-private-urls" in (error.hint or "") else hint
            raise DataError(error.message, place=shown(given), hint=hint) from None
        except OSError as error:
            found = f"cannot be read ({error.strerror or error})"
            if isinstance(error, FileNotFoundError):
                found, hint = "no such image", "relative paths start at the working directory"
            raise DataError(found, place=shown(path), hint=hint) from None
        named = given if ADDRESS.match(given) else os.path.abspath(given)  # noqa: PTH100
        self.images.append(ImageRef(copy, named, facts))
        width, height = facts.size
        console.info(
            f"attached {path.name}, {width} x {height} pixels; "
            f"images of the next message: {len(self.images)}"
        )


def _images(given: str) -> list[str]:
    """The files and web addresses that a text after /image names.

    As it is, or as a shell or a terminal writes them: a terminal writes a file that is dropped into
    it with quotes, with backslashes or as a URL.
    """
    if not given:
        raise DataError("/image without a path", hint="write /image PATH")
    words = [given]
    if given.startswith("file:"):
        words = [unquote(urlsplit(given).path)]
    elif not _is_there(given):
        with suppress(ValueError):
            words = shlex.split(given) or words
            if not all(map(_is_there, words[1:])):
                words = [given]
    for word in words:
        if re.match(r"\w+://|data:", word) and not ADDRESS.match(word):
            raise DataError(
                f"found {word[:60]!r} as an image; files and web addresses are allowed",
                hint="download the image, then write /image PATH",
            )
    return [word if ADDRESS.match(word) else expand_home(word) for word in words]


def _is_there(word: str) -> bool:
    """Whether a word names an image alone, as far as can be told without opening it."""
    if ADDRESS.match(word):
        return " " not in word
    # Not Path.exists, which fails for a name that is too long.
    return os.path.exists(expand_home(word))  # noqa: PTH110


def without_tag(system: str | None, image_tag: str) -> str | None:
    """A system prompt that can be used.

    Raises:
        DataError: it holds an image tag.
    """
    for tag in (COMMON_TAG, image_tag):
        if system and tag in system:
            raise DataError(f"found {tag} in the system prompt", hint="/image PATH attaches images")
    return system
