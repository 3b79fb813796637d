"""Records -> conversations: the layout is found, images are placed, nothing is left in silence."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vlft.data.conversation import Conversation, ImageRef, Origin, Turn
from vlft.data.layouts import drafts_of
from vlft.data.layouts.ask import LayoutError
from vlft.data.layouts.draft import ImagePart
from vlft.data.layouts.fields import Fields
from vlft.data.layouts.place import NAMED, ImagePlacer
from vlft.data.layouts.place_objects import place_objects
from vlft.data.layouts.question import PROMPT
from vlft.data.layouts.turns import unread_keys
from vlft.data.names import DRAWN, IMAGES, KEPT, KNOWN
from vlft.data.records import Record, RecordError
from vlft.data.references import has_bytes, image_refs, images_by_tag, is_empty
from vlft.data.result_fields import without_result
from vlft.data.weights import WEIGHT, weight_of
from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from vlft.data.layouts.draft import Draft, Layout
    from vlft.data.options import Reading

IMAGE_ENDING = re.compile(
    r".+\.(jpe?g|png|webp|gif|bmp|tiff?|heic|avif)", re.IGNORECASE | re.DOTALL
)
# How alike a name must be to one of an image column, or of another optional one.
LIKE_IMAGES, LIKE_OTHER = 0.8, 0.85


@dataclass(frozen=True)
class ReadRecord:
    """What became of a record.

    Attributes:
        conversations: mostly one.
        layout: that was found.
        columns: names that were read.
        unread: names of filled columns that were not.
        flags: those of ``--columns`` and ``--prompt`` that decided something.
        weight: how often an epoch has it.
    """

    conversations: tuple[Conversation, ...]
    layout: Layout
    columns: tuple[str, ...]
    unread: tuple[str, ...]
    flags: frozenset[str]
    weight: float = 1.0


def read_record(record: Record, reading: Reading, folder: Path) -> ReadRecord:
    """The conversations of a record.

    Args:
        record: as read from a file.
        reading: see Reading.
        folder: where relative image paths start.

    Raises:
        RecordError: what is wrong, with the place.
    """
    try:
        return _read(record, reading, folder)
    except DataError as error:
        raise RecordError(error, record) from None


def read_row(row: Mapping[str, Any], reading: Reading, folder: Path) -> Conversation:
    """The conversation of a record that was given through Python.

    Raises:
        DataError: what is wrong with it.
    """
    try:
        return replace(_read(Record(row, folder, 0), reading, folder).conversations[0], origin=None)
    except DataError as error:
        raise DataError(error.message, place="row", hint=error.hint) from None


def _read(record: Record, reading: Reading, folder: Path) -> ReadRecord:
    turns = record.fields if isinstance(record.fields, list | tuple) else None
    values = {} if turns is not None else record.fields
    fields = Fields(without_result(values, reading.need_response), reading.columns, turns)
    drafts, layout = drafts_of(fields, reading)
    weight = weight_of(fields.take(WEIGHT))
    drawn = _drawn(fields, reading, folder)
    name = _image_column(fields)
    value = fields.take(name) if name else None
    unread = _unread(fields)
    if name is None and not any(map(_has_images, drafts)):
        _check_unread(fields, unread)
    _check_names(fields, unread)
    label = f'"{name}"'
    images = images_by_tag(value, label, folder) or image_refs(value, label, folder)
    placer = ImagePlacer(
        images,
        reading.image_tag,
        lambda v, n: image_refs(v, n, folder),
        has_objects=drafts[0].objects is not None,
    )
    kept = {name: values.get(name) for name in KEPT}
    origin = Origin(record.path, record.line, record.number, **kept)
    made: list[Conversation] = []
    for draft in drafts:
        placer.check_system(draft.system)
        names = [message.name for message in draft.messages]
        placed = placer.place(draft.messages)
        if draft.objects is not None:
            of_record = list(images.values() if isinstance(images, dict) else images)
            of_record = of_record or [p for t in placed for p in t.parts if isinstance(p, ImageRef)]
            placed = place_objects(placed, draft.objects, of_record, names)
        turns = [*zip(placed, names, strict=True), *_reply_of(drawn, placed)]
        for part in _samples(turns) if reading.qa == "samples" else [turns]:
            checked = _checked(part, reading)
            made.append(Conversation(checked, draft.system, record.place, origin))
    columns = tuple(name for name in fields.values if name in fields.read)
    inside = (f"{name}[].{key}" for name in columns for key in _unread_inside(fields.values[name]))
    unread = (*unread, *inside, *(f"[].{key}" for key in _unread_inside(fields.turns)))
    flags = {f"--columns {role}={name}" for role, name in fields.given.items()}
    if any(message.name == PROMPT for draft in drafts for message in draft.messages):
        flags.add(PROMPT)
    return ReadRecord(tuple(made), layout, columns, unread, frozenset(flags), weight)


def _drawn(fields: Fields, reading: Reading, folder: Path) -> ImageRef | None:
    """The image that the reply is; None if it is none, or is not to be read.

    Raises:
        DataError: there are several.
    """
    value = fields.take(DRAWN) if fields.filled(DRAWN) else None
    if value is None or not reading.drawn_replies:
        return None
    images = image_refs(value, f'"{DRAWN}"', folder)
    if len(images) != 1:
        hint = "write a record for each image"
        raise DataError(f'{len(images)} images in "{DRAWN}", 1 is allowed', hint=hint)
    return images[0]


def _reply_of(drawn: ImageRef | None, turns: Sequence[Turn]) -> list[tuple[Turn, str]]:
    """The turn of a drawn reply, with its name; empty if the reply is text.

    Raises:
        DataError: there is a reply of text as well.
    """
    if drawn is None:
        return []
    if turns and turns[-1].role == "assistant":
        found = f'found a reply of text and "{DRAWN}"; one of the two is allowed'
        raise DataError(found, hint="leave one of them out")
    return [(Turn("assistant", (drawn,)), f'"{DRAWN}"')]


def _image_column(fields: Fields) -> str | None:
    """The column with the images: the filled one, of two the one with bytes.

    Raises:
        LayoutError: two are filled.
    """
    names = [
        name
        for name in fields.named("images")
        if not is_empty(fields.values.get(name))
        and ("images" in fields.given or fields.is_free(name))
    ]
    if len(names) > 1:
        embedded = [name for name in names if has_bytes(fields.values[name])]
        if len(embedded) != 1:
            found = f"{' and '.join(names)} could be the images"
            raise LayoutError(found, fields, f"say which: --columns images={names[0]}")
        fields.read.update(names)
        return embedded[0]
    return names[0] if names else None


def _has_images(draft: Draft) -> bool:
    """Whether the messages of a draft hold images or name them."""
    return any(
        message.images is not None
        or any(isinstance(part, ImagePart) or NAMED.search(part) for part in message.content)
        for message in draft.messages
    )


def _unread(fields: Fields) -> tuple[str, ...]:
    """Names of the filled columns that no rule has read."""
    return tuple(
        name
        for name, value in fields.values.items()
        if name not in fields.read
        and name not in (*KEPT, *IMAGES)
        and not name.startswith("_")
        and not is_empty(value)
    )


def _unread_inside(value: Any) -> list[str]:
    """The keys of a dialogue's turns that no rule has read."""
    return unread_keys(value) if isinstance(value, list | tuple) else []


def _check_unread(fields: Fields, unread: Sequence[str]) -> None:
    """Raises LayoutError if a column of a record without images seems to hold them."""
    for name in unread:
        value = fields.values[name]
        near = difflib.get_close_matches(name.lower(), IMAGES, n=1, cutoff=LIKE_IMAGES)
        if name not in KNOWN and near and isinstance(value, str | list | dict):
            found = f'"{name}" is not read, and the record has no image'
            hint = f'did you mean "{near[0]}"? Or add --columns images={name}'
            raise LayoutError(found, fields, hint)
        if _looks_like_images(value):
            found = f'"{name}" seems to hold images, and the record has no other'
            hint = f"add --columns images={name} to read it, or leave the column out"
            raise LayoutError(found, fields, hint)


def _check_names(fields: Fields, unread: Sequence[str]) -> None:
    """Raises LayoutError if the name of an optional column is misspelt."""
    for name in unread:
        near = difflib.get_close_matches(
            name.lower(), ("history", "system"), n=1, cutoff=LIKE_OTHER
        )
        if near and name not in KNOWN and near[0] not in fields.read:
            found, hint = f'"{name}" is not read', f'did you mean "{near[0]}"?'
            raise LayoutError(found, fields, hint)


def _looks_like_images(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_looks_like_images, value))
    if isinstance(value, dict):
        return bool(value.get("bytes"))
    return isinstance(value, bytes) or (
        isinstance(value, str) and bool(IMAGE_ENDING.fullmatch(value.strip()))
    )


def _samples(turns: Sequence[tuple[Turn, str]]) -> list[list[tuple[Turn, str]]]:
    """Each question with its reply as a dialogue of its own, on the images of the first one."""
    first = [part for part in turns[0][0].parts if isinstance(part, ImageRef)]
    made = []
    for start in range(0, len(turns), 2):
        (question, name), *reply = turns[start : start + 2]
        if not any(isinstance(part, ImageRef) for part in question.parts):
            question = replace(question, parts=(*first, *question.parts))
        if not reply or reply[0][0].is_trained:
            made.append([(question, name), *reply])
    return made


def _checked(turns: Sequence[tuple[Turn, str]], reading: Reading) -> tuple[Turn, ...]:
    """The turns with their final losses.

    Raises:
        DataError: a text is empty, the reply is missing, or none is trained.
    """
    kept = list(turns)
    last, name = kept[-1]
    if last.role == "assistant" and not reading.need_response and _is_blank(last):
        kept.pop()
    elif last.role == "user" and reading.need_response:
        hint = "training needs the reply that is to be learnt; vlft infer answers the question"
        raise DataError(f"no reply follows {name}", hint=hint)
    shown = {part for turn, _ in kept for part in turn.parts if isinstance(part, ImageRef)}
    for turn, name in kept:
        hidden = next((box for box in turn.boxes if box.image not in shown), None)
        if hidden is not None:
            hint = "read the record as one dialogue, without --qa samples"
            raise DataError(f"{hidden.name} is on an image of another question", hint=hint)
        if _is_blank(turn):
            hint = "write the question"
            if turn.role == "assistant":
                hint = "write the reply; only vlft infer works without"
            raise DataError(f"{name} is empty", hint=hint)
    made = [turn for turn, _ in kept]
    if reading.loss_on == "last":
        made = [replace(turn, is_trained=False) for turn in made[:-1]] + made[-1:]
    if reading.need_response and not any(t.is_trained for t in made if t.role == "assistant"):
        raise DataError("no reply is trained", hint="set one loss to true, or drop the record")
    return tuple(made)


def _is_blank(turn: Turn) -> bool:
    return not any(isinstance(part, ImageRef) or part.strip() for part in turn.parts)
