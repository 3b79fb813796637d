"""A sample before it is prepared for a model: turns of text and images."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from vlft.errors import shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vlft.data.image_notes import Note

Role = Literal["user", "assistant"]


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image file once it has been checked.

    Attributes:
        digest: SHA-256 of its bytes; equal digests are the same image.
        size: (width, height) in pixels, as the model gets it.
        notes: what a user would not expect of it.
        look: see looks.look_of; empty if it is not needed.
    """

    digest: str
    size: tuple[int, int]
    notes: tuple[Note, ...] = ()
    look: bytes = field(default=b"", compare=False, repr=False)


@dataclass(frozen=True)
class ImageRef:
    """A reference to an image file; holds no pixels.

    Attributes:
        given: the path as the data file has it, for results and messages.
        address: where the file is downloaded from, if it is not there.
        facts: found when the data is checked, and valid for the whole run even if the file changes
            later; None before.
    """

    path: Path
    given: str
    facts: ImageFacts | None = None
    address: str | None = None

    @property
    def shown(self) -> str:
        """The image for a message: its address or its path."""
        return self.address or shown(self.path)


@dataclass(frozen=True)
class Box:
    """A box on an image, in the numbers of its record.

    Attributes:
        corners: x1, y1, x2, y2.
        kind: what they are, see boxes.KINDS.
        name: of the box, for messages.
    """

    corners: tuple[float, float, float, float]
    kind: str
    image: ImageRef
    name: str


Part = str | ImageRef


@dataclass(frozen=True)
class Turn:
    """One message: a role, and text and images in the order they are read.

    Attributes:
        is_trained: whether a reply is trained; without meaning for the user's.
        boxes: of the tags ``<bbox>`` in the texts, in order; none once they are written, see
            boxes.write_boxes.
    """

    role: Role
    parts: tuple[Part, ...]
    is_trained: bool = True
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Origin:
    """Where a record was read, and its fields that only results need.

    Attributes:
        path: the data file.
        line: number of its line, from 1.
        number: of the record in the file, from 1.
        id: the record's own, of any type; so is ``meta``.
    """

    path: Path
    line: int
    number: int = 0
    id: Any = None
    meta: Any = None


@dataclass(frozen=True)
class Conversation:
    """A dialogue that starts with the user and alternates.

    Attributes:
        turns: the last is the assistant's reply, which is text or an image, or the user's if a
            reply is to be generated.
        system: system prompt; None for the family's default, "" for none.
        place: of the record, for messages, e.g. ``train.jsonl:17``.
        origin: of the record; None for one that was given through Python.
    """

    turns: tuple[Turn, ...]
    system: str | None = None
    place: str = ""
    origin: Origin | None = field(default=None, compare=False)

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """All images in the order they are read."""
        return tuple(p for turn in self.turns for p in turn.parts if isinstance(p, ImageRef))

    @property
    def drawn(self) -> ImageRef | None:
        """The image that the reply is; None for a reply of text and for a question."""
        last = self.turns[-1]
        if last.role == "user":
            return None
        return next((part for part in last.parts if isinstance(part, ImageRef)), None)

    @property
    def reply(self) -> str | None:
        """The text of the last turn, None if that is the user's."""
        last = self.turns[-1]
        return flat_text(last, "") if last.role == "assistant" else None

    def map_images(self, change: Callable[[ImageRef], ImageRef]) -> Conversation:
        """The same dialogue with every image reference changed."""

        def changed(turn: Turn) -> Turn:
            parts = tuple(change(p) if isinstance(p, ImageRef) else p for p in turn.parts)
            boxes = tuple(replace(box, image=change(box.image)) for box in turn.boxes)
            return replace(turn, parts=parts, boxes=boxes)

        return replace(self, turns=tuple(map(changed, self.turns)))

    def without_reply(self) -> Conversation:
        """The same dialogue up to the last user turn."""
        turns = self.turns[:-1] if self.turns[-1].role == "assistant" else self.turns
        return replace(self, turns=turns)

    def without_first_exchanges(self, count: int) -> Conversation:
        """The same dialogue without its first user turns, their images and the replies to them."""
        return replace(self, turns=self.turns[2 * count :])


def flat_text(turn: Turn, image_tag: str) -> str:
    """The turn as one string, with the tag in place of each image."""
    return "".join(part if isinstance(part, str) else image_tag for part in turn.parts)
