"""A conversation as a layout gives it: messages whose images are not placed yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlft.data.layouts.fields import Fields
    from vlft.data.layouts.objects import Objects
    from vlft.data.options import Reading

Speaker = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class ImagePart:
    """A place of an image in a list of parts.

    Attributes:
        value: the image; None if the record lists it.
        index: its index in that list; None for the next one.
    """

    value: Any = None
    index: int | None = None


Content = tuple["str | ImagePart", ...]


@dataclass(frozen=True)
class Message:
    """A message.

    Attributes:
        content: texts, which may hold image tags, and places of images.
        name: of the message, for messages of errors: ``turn 3`` or ``"query"``.
        images: the value of its own image field; None if it has none.
        is_trained: whether a reply is trained.
    """

    speaker: Speaker
    content: Content
    name: str
    images: Any = None
    is_trained: bool = True


@dataclass(frozen=True)
class Draft:
    """A dialogue that starts with the user and alternates.

    Attributes:
        messages: of user and assistant.
        system: the system prompt; None for the family's default, "" for none.
        objects: of the tags for boxes in its texts; None if it has none.
    """

    messages: tuple[Message, ...]
    system: str | None = None
    objects: Objects | None = None


@dataclass(frozen=True)
class Layout:
    """A way to write conversations.

    Attributes:
        name: for ``--layout``.
        title: in words, for what was detected.
        fits: whether a record is in it.
        read: the drafts of a record in it, mostly one.
    """

    name: str
    title: str
    fits: Callable[[Fields], bool]
    read: Callable[[Fields, Reading], list[Draft]] = field(repr=False)
