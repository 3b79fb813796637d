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
from vlft.data.conversation import ImageRef, Turn
from vlft.data.images import inspect_image
from vlft.data.layouts.place import COMMON_TAG, place_in_text
from vlft.errors import DataError, shown
from vlft.files import expand_home

HELP = """\
/image PATH   attach an image to the next message
/system TEXT  start a new dialogue with this system prompt
/clear        start a new dialogue
/help         show these lines
/exit         leave (Ctrl-D does too); Ctrl-C ends a reply"""


@dataclass
class Dialogue:
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
            self.system, self.turns = without_tag(argument, self.image_tag), []
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


def without_tag(system: str | None, image_tag: str) -> str | None:
    """A system prompt that can be used.

    Raises:
        DataError: it holds an image tag.
    """
    for tag in (COMMON_TAG, image_tag):
        if system and tag in system:
            raise DataError(f"found {tag} in the system prompt", hint="/image PATH attaches images")
    return system
