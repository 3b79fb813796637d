"""Tags for boxes in the texts of a record, with its objects in their places.

"Find <ref-object>.", "<bbox>"  ->  "Find <|ref|>cat<|/ref|>.", "<|ref|>cat<|/ref|><bbox>"

What a ``<bbox>`` becomes depends on the size of its image, see boxes.write_boxes.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from vlft.data.boxes import BOX_TAG, REF, REF_TAG, RUN
from vlft.data.conversation import Box, flat_text
from vlft.data.layouts.ask import LayoutError
from vlft.data.layouts.draft import Message
from vlft.data.layouts.objects import NAME
from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vlft.data.conversation import ImageRef, Turn
    from vlft.data.layouts.draft import Draft
    from vlft.data.layouts.fields import Fields
    from vlft.data.layouts.objects import Objects, Place
    from vlft.data.options import Reading

TAG = re.compile(f"{REF_TAG}|{BOX_TAG}")
WRITTEN_REF = re.compile(r"<\|ref\|>(.*?)<\|/ref\|>", re.DOTALL)


def with_objects(draft: Draft, objects: Objects, fields: Fields, reading: Reading) -> Draft:
    """The draft with its objects; those that no tag places are its reply, or are dropped.

    Raises:
        LayoutError: nothing says which.
        DataError: they cannot be the reply.
    """
    texts = (p for m in draft.messages for p in m.content if isinstance(p, str))
    if any(TAG.search(text) for text in texts):
        if not reading.has_boxes:
            raise DataError(f"found {REF_TAG} or {BOX_TAG}; this family has no tags for boxes")
        return replace(draft, objects=objects)
    if reading.objects == "drop":
        return draft
    if reading.objects is None:
        raise LayoutError(
            f'found "{NAME}", and no {REF_TAG} or {BOX_TAG} in the texts places them',
            fields,
            f"put {REF_TAG}{BOX_TAG} where they belong, or add --objects reply (they are the "
            "reply) or drop",
        )
    *before, last = draft.messages
    if last.speaker == "user":
        before.append(last)
    elif any(not isinstance(part, str) or part.strip() for part in last.content):
        found = f'{last.name} is a reply already, and no tag places "{NAME}" in it'
        raise DataError(found, hint=f"put {REF_TAG}{BOX_TAG} where they belong")
    text, objects = _as_reply(objects)
    reply = Message("assistant", (text,), "--objects reply")
    return replace(draft, messages=(*before, reply), objects=objects)


def _as_reply(objects: Objects) -> tuple[str, Objects]:
    """The text of a reply that is nothing but boxes, and its objects: each ref once in a row.

    Raises:
        DataError: refs and boxes do not pair.
    """
    refs, places = objects.refs, objects.places
    if len(refs) <= 1:
        return REF_TAG * len(refs) + BOX_TAG * len(places), objects
    if len(refs) != len(places):
        found = f'"{NAME}" has {len(refs)} refs and {len(places)} boxes'
        raise DataError(found, hint="give each box a ref")
    firsts = [i for i, ref in enumerate(refs) if i == 0 or ref != refs[i - 1]]
    ends = [*firsts[1:], len(refs)]
    lines = [REF_TAG + BOX_TAG * (end - i) for i, end in zip(firsts, ends, strict=True)]
    return "\n".join(lines), replace(objects, refs=tuple(refs[i] for i in firsts))


def place_objects(
    turns: Sequence[Turn], objects: Objects, images: Sequence[ImageRef], names: Sequence[str]
) -> list[Turn]:
    """The turns with the refs as text and their boxes.

    Args:
        turns: with tags in their texts.
        objects: of the tags, in order. A prompt without its reply may leave some.
        images: of the record.
        names: of the turns, for messages.

    Raises:
        DataError: there are more tags than objects, or fewer.
    """
    texts = [part for turn in turns for part in turn.parts if isinstance(part, str)]
    tags = [tag[0] for text in texts for tag in TAG.finditer(text)]
    has_reply = turns[-1].role == "assistant" and flat_text(turns[-1], "").strip() != ""
    for tag, given in ((REF_TAG, len(objects.refs)), (BOX_TAG, len(objects.places))):
        count = tags.count(tag)
        if count > given or (count < given and has_reply):
            what = "ref" if tag == REF_TAG else "bbox"
            raise DataError(
                f'{given} {what} in "{NAME}", {count} {tag} in the texts',
                hint=f"put one {tag} per {what}, in the order they are read",
            )
    refs, places = iter(objects.refs), iter(objects.places)
    placed: list[Turn] = []
    asked: list[str] = []
    for turn, name in zip(turns, names, strict=True):
        turn = _placed(turn, refs, places, images)
        own = WRITTEN_REF.findall("".join(part for part in turn.parts if isinstance(part, str)))
        if turn.role == "assistant" and not own and asked:
            turn = _repeat_refs(turn, asked, name)
        asked = own
        placed.append(turn)
    return placed


def _placed(
    turn: Turn,
    refs: Iterator[str],
    places: Iterator[tuple[Place, ...]],
    images: Sequence[ImageRef],
) -> Turn:
    boxes: list[Box] = []

    def fill(tag: re.Match[str]) -> str:
        if tag[0] == REF_TAG:
            return REF.format(next(refs))
        made = [_box(place, images) for place in next(places)]
        boxes.extend(made)
        return BOX_TAG * len(made)

    parts = tuple(TAG.sub(fill, part) if isinstance(part, str) else part for part in turn.parts)
    return replace(turn, parts=parts, boxes=tuple(boxes))


def _box(place: Place, images: Sequence[ImageRef]) -> Box:
    if place.image >= len(images):
        count = "1 image" if len(images) == 1 else f"{len(images)} images"
        found = f"{place.name} is on image {place.image}, the record has {count}"
        raise DataError(found, hint="image_id counts the images of the record from 0")
    return Box(place.corners, place.kind, images[place.image], place.name)


def _repeat_refs(turn: Turn, asked: Sequence[str], name: str) -> Turn:
    """A reply of boxes alone with the refs of its question, as the models repeat them.

    Raises:
        DataError: the question has several, and not one for each group of boxes.
    """
    runs = sum(len(RUN.findall(part)) for part in turn.parts if isinstance(part, str))
    if len(asked) not in (1, runs) and runs:
        raise DataError(
            f"{name} has {runs} groups of {BOX_TAG} and no {REF_TAG}, its question {len(asked)}",
            hint=f"put a {REF_TAG} before each {BOX_TAG}",
        )
    left = iter(asked if len(asked) == runs else [asked[0]] * runs)
    parts = (
        RUN.sub(lambda run: REF.format(next(left)) + run[0], part)
        if isinstance(part, str)
        else part
        for part in turn.parts
    )
    return replace(turn, parts=tuple(parts))
