"""Messages -> turns: every image where its tag is or, without tags, where its turn starts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from vlft.data.boxes import BOX_TAG, REF_TAG
from vlft.data.conversation import ImageRef, Turn
from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlft.data.conversation import Part, Role
    from vlft.data.layouts.draft import Message

COMMON_TAG = "<image>"
# Read on every family; <img>PATH</img> names its image.
TAGS = (COMMON_TAG, "<image_placeholder>", "<ImageHere>")
NAMED = re.compile(r"<img>(.*?)</img>", re.DOTALL)
# Tags of other tools for what has not been placed: never text.
FOREIGN = (
    r"<video>|<audio>|<image[ _]?\d+>|<\|(?:image|video|audio)_pad\|>|<\|image(?:_\d+)?\|>|"
    r"<\|vision_start\|>|<IMG_CONTEXT>|<image_soft_token>"
)
LEFT_OVER = re.compile(f"{FOREIGN}|{BOX_TAG}|{REF_TAG}")
LEFT_OVER_OF_OBJECTS = re.compile(FOREIGN)
SKIP = "drop such records with --on-bad-sample skip"


@dataclass(frozen=True)
class _Slot:
    """A place that waits for an image of the record.

    Attributes:
        key: the tag, if the record names its images by tag; the index, if a part names it.
    """

    key: str | int | None = None


_Piece = str | ImageRef | _Slot
_Images = Sequence[ImageRef] | Mapping[str, ImageRef]


@lru_cache
def _tag_pattern(tags: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(tags, key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, longest_first), NAMED.pattern]), re.DOTALL)


class ImagePlacer:
    """Puts the images of a record into its messages.

    Args:
        images: of the record, by tag or in order.
        image_tag: the family's own tag.
        resolve: (value of an image, name of its field) -> references.
        has_objects: whether the tags for boxes in the texts have objects of the record.
    """

    def __init__(
        self,
        images: _Images,
        image_tag: str,
        resolve: Callable[[object, str], list[ImageRef]],
        *,
        has_objects: bool = False,
    ) -> None:
        self._left_over = LEFT_OVER_OF_OBJECTS if has_objects else LEFT_OVER
        self._by_tag = images if isinstance(images, Mapping) else {}
        self._images = [] if isinstance(images, Mapping) else list(images)
        self._resolve = resolve
        self._tag = _tag_pattern(frozenset({*TAGS, image_tag, *self._by_tag}))

    def place(self, messages: Sequence[Message]) -> list[Turn]:
        """The turns of the messages.

        Raises:
            DataError: images and tags do not fit, a tag is in a reply, or a foreign tag is left.
        """
        pieces = [self._pieces(message) for message in messages]
        shared = [
            index
            for index, message in enumerate(messages)
            if message.speaker == "user" and message.images is None
        ]
        for index, message in enumerate(messages):
            if message.images is not None:
                if message.speaker == "assistant":
                    raise _in_reply("images", message)
                own = self._resolve(message.images, f'{message.name}: "images"')
                pieces[index] = _fill([pieces[index]], own)[0]
        slots = [piece for index in shared for piece in pieces[index] if isinstance(piece, _Slot)]
        if self._by_tag:
            self._check_tags(slots)
        elif self._images and not slots and shared:
            if any(isinstance(piece, ImageRef) for index in shared for piece in pieces[index]):
                # The texts name images themselves, maybe the same ones.
                raise _wrong_number(len(self._images), 0)
            pieces = _at_starts(pieces, shared, self._images)
        filled = _fill([pieces[index] for index in shared], self._images or self._by_tag)
        for index, parts in zip(shared, filled, strict=True):
            pieces[index] = parts
        return [
            Turn(_role(message), _joined(parts), message.is_trained or message.speaker == "user")
            for message, parts in zip(messages, pieces, strict=True)
        ]

    def check_system(self, system: str | None) -> None:
        """Raises DataError if a system prompt holds a tag."""
        found = self._tag.search(system or "") or LEFT_OVER.search(system or "")
        if found:
            hint = "images belong in a question"
            raise DataError(f"found {found[0][:60]} in the system prompt", hint=hint)

    def _pieces(self, message: Message) -> list[_Piece]:
        """Texts, images that a text names, and slots, in order."""
        pieces: list[_Piece] = []
        for part in message.content:
            if isinstance(part, str):
                pieces += self._split(part, message)
            elif part.value is not None:
                pieces += self._resolve(part.value, message.name)
            else:
                pieces.append(_Slot(part.index))
        if message.speaker == "assistant" and not all(isinstance(p, str) for p in pieces):
            raise _in_reply("an image", message)
        return pieces

    def _split(self, text: str, message: Message) -> list[_Piece]:
        pieces: list[_Piece] = []
        end = 0
        for tag in self._tag.finditer(text):
            pieces.append(text[end : tag.start()])
            end = tag.end()
            named = NAMED.fullmatch(tag[0])
            if message.speaker == "assistant":
                raise _in_reply(tag[0][:60], message)
            if named:
                pieces += self._resolve(named[1], message.name)
            else:
                pieces.append(_Slot(tag[0] if tag[0] in self._by_tag else None))
        pieces.append(text[end:])
        for piece in pieces:
            left = self._left_over.search(piece) if isinstance(piece, str) else None
            if left:
                found = f"found {left[0]} in {message.name}, and nothing that belongs there"
                raise DataError(found, hint=f"take it out of the text, or {SKIP}")
        return [piece for piece in pieces if piece != ""]

    def _check_tags(self, slots: Sequence[_Slot]) -> None:
        missing = self._by_tag.keys() - {slot.key for slot in slots}
        if missing:
            found = f"{sorted(missing)[0]} has an image and is not in the text"
            raise DataError(found, hint="put the tag where the image belongs")


def place_in_text(text: str, images: Sequence[ImageRef], image_tag: str) -> Turn:
    """A user's turn with images at their tags, or at the start of a text without tags.

    Raises:
        DataError: there are more tags than images, or fewer.
    """
    tag = re.compile(f"({re.escape(COMMON_TAG)}|{re.escape(image_tag)})")
    pieces = [_Slot() if tag.fullmatch(piece) else piece for piece in tag.split(text) if piece]
    return Turn("user", _joined(_fill([pieces], images)[0]))


def _role(message: Message) -> Role:
    return "assistant" if message.speaker == "assistant" else "user"


def _joined(pieces: Sequence[_Piece]) -> tuple[Part, ...]:
    """Parts, with neighbouring texts as one."""
    parts: list[Part] = []
    for piece in pieces:
        if isinstance(piece, str) and parts and isinstance(parts[-1], str):
            parts[-1] += piece
        elif isinstance(piece, str | ImageRef):
            parts.append(piece)
    return tuple(parts)


def _fill(messages: Sequence[list[_Piece]], images: _Images) -> list[list[_Piece]]:
    """The pieces with images in their slots; images of a message without slots start it.

    Raises:
        DataError: there are more of the one than of the other.
    """
    slots = [piece for pieces in messages for piece in pieces if isinstance(piece, _Slot)]
    if isinstance(images, Mapping):
        chosen = [images.get(str(slot.key)) for slot in slots]
    else:
        if images and not slots and len(messages) == 1:
            return [[*images, *messages[0]]]
        chosen = _in_order(slots, list(images))
    if None in chosen or len(chosen) < len(slots):
        raise _wrong_number(len(images), len(slots))
    left = iter(chosen)
    return [
        [next(left) or "" if isinstance(piece, _Slot) else piece for piece in pieces]
        for pieces in messages
    ]


def _in_order(slots: Sequence[_Slot], images: list[ImageRef]) -> list[ImageRef | None]:
    """The image of each slot: that of its index, else the next one that no index names.

    Raises:
        DataError: an index is too large, or not every image has a slot.
    """
    named = {slot.key for slot in slots if isinstance(slot.key, int)}
    wrong = next((i for i in named if not 0 <= i < len(images)), None)
    if wrong is not None:
        found = f"a part has the index {wrong}, {_listed(len(images))} listed"
        raise DataError(found, hint="indices start at 0")
    rest = [image for index, image in enumerate(images) if index not in named]
    if len(rest) != sum(slot.key is None for slot in slots):
        raise _wrong_number(len(images), len(slots))
    left = iter(rest)
    return [images[s.key] if isinstance(s.key, int) else next(left) for s in slots]


def _at_starts(
    pieces: list[list[_Piece]], turns: Sequence[int], images: Sequence[ImageRef]
) -> list[list[_Piece]]:
    """The pieces with slots at the start of the turns that the images belong to."""
    count = len(images)
    if len(turns) == 1 or count == 1:
        per_turn = [count] + [0] * (len(turns) - 1)
    elif count == len(turns):
        per_turn = [1] * len(turns)
    else:
        raise DataError(
            f"{count} images listed, {len(turns)} user turns and no {COMMON_TAG} in the text",
            hint=f"put {COMMON_TAG} where each image belongs",
        )
    placed = list(pieces)
    for index, number in zip(turns, per_turn, strict=True):
        placed[index] = [*[_Slot()] * number, *pieces[index]]
    return placed


def _in_reply(what: str, message: Message) -> DataError:
    found = f"found {what} in {message.name}, a reply"
    return DataError(found, hint="images belong in a question")


def _listed(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _wrong_number(images: int, slots: int) -> DataError:
    return DataError(
        f"{_listed(images)} listed, {slots} {COMMON_TAG} in the text",
        hint=f'put one {COMMON_TAG} per entry of "images", in the order they are read',
    )
