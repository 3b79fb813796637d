"""A data file read: its conversations, its problems, and what was found of its form."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlft.console import info, tracked, warn
from vlft.data.download import download_images
from vlft.data.images import inspect_images
from vlft.data.in_memory import image_folder, is_kept
from vlft.data.items import Items
from vlft.data.layouts.ask import LayoutError, with_columns
from vlft.data.layouts.question import PROMPT
from vlft.data.missing import MISSING, near_image, root_hint
from vlft.data.read import read_record
from vlft.data.records import RecordError
from vlft.errors import ConfigError, DataError, UsageError, shown

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from vlft.data.conversation import Conversation, ImageRef
    from vlft.data.encoder import Encoder
    from vlft.data.items import Inspected
    from vlft.data.options import DataOptions, Reading
    from vlft.data.read import ReadRecord
    from vlft.data.receipt import Receipt
    from vlft.data.records import Record, Records


@dataclass(frozen=True)
class Form:
    """How a data file was read.

    Attributes:
        kind: of its container, in words.
        note: what else the user should know of the container.
        layouts: that its records have, in words.
        columns: that were read.
        unread: filled columns that were not.
    """

    kind: str
    note: str
    layouts: tuple[str, ...]
    columns: tuple[str, ...]
    unread: tuple[str, ...]

    def __str__(self) -> str:
        layouts = " and ".join(self.layouts)
        read = f": {', '.join(self.columns)}" if self.columns else ""
        unread = f"; not read: {', '.join(self.unread)}" if self.unread else ""
        note = f"; {self.note}" if self.note else ""
        return f"{self.kind}, {layouts or 'no record read'}{read}{unread}{note}"


@dataclass(frozen=True)
class ReadFile:
    """What became of the drawn records of a file.

    Attributes:
        path: of the file.
        form: how it was read.
        items: conversations with their images checked, each with the index of its record.
        problems: of the other records.
        indices: of the records that were drawn.
        flags: see ReadRecord.
        images: as the file names them first.
    """

    path: Path
    form: Form
    items: Items
    problems: tuple[RecordError, ...]
    indices: Sequence[int]
    flags: frozenset[str]
    images: Mapping[Path, ImageRef]


def read_file(
    records: Records,
    indices: Sequence[int],
    options: DataOptions,
    inspected: Inspected,
    encoder: Encoder | None = None,
) -> ReadFile:
    """The conversations of some records of a file.

    Args:
        records: of the file.
        indices: of those that are read.
        options: see DataOptions.
        inspected: images that were checked before; those checked here are added.
        encoder: of the checkpoint that they are for, if that is known.
    """
    path = records.path
    folder = options.image_root or image_folder(path)
    items = Items(records, options.reading, folder, inspected)
    found = _Found(Counter(), {}, {}, set(), {})
    problems: dict[int, RecordError] = {}
    for index in tracked(indices, f"reading {path.name}", len(indices)):
        try:
            read = _read(records[index], options, folder, encoder)
        except RecordError as error:
            problems[index] = error
            continue
        items.add(index, read)
        found.add(read)
        if encoder is not None and any(map(encoder.as_text, read.conversations)):
            items.note_special(len(read.conversations))
    _check_images(items, found.images, records, options, problems)
    items.keep_only(~np.isin(np.asarray(items.columns.record), list(problems)))
    ordered = tuple(problems[index] for index in sorted(problems))
    layouts, columns, unread = tuple(found.layouts), tuple(found.columns), tuple(found.unread)
    form = Form(records.kind, records.note, layouts, columns, unread)
    return ReadFile(path, form, items, ordered, indices, frozenset(found.flags), found.images)


def restored_file(
    records: Records, receipt: Receipt, options: DataOptions, inspected: Inspected
) -> ReadFile:
    """What a receipt says of a file; images that have changed since are checked again."""
    path, meta = records.path, receipt.meta
    items = Items(records, options.reading, options.image_root or image_folder(path), inspected)
    items.restore(receipt)
    problems: dict[int, RecordError] = {}
    _check_images(items, receipt.refs(), records, options, problems)
    items.keep_only(~np.isin(np.asarray(items.columns.record), list(problems)))
    names = (tuple(meta[name]) for name in ("layouts", "columns", "unread"))
    form = Form(meta["kind"], meta["note"], *names)
    ordered = tuple(problems[index] for index in sorted(problems))
    flags = frozenset(meta["flags"])
    return ReadFile(path, form, items, ordered, range(len(records)), flags, receipt.refs())


def _check_images(
    items: Items,
    found: Mapping[Path, ImageRef],
    records: Records,
    options: DataOptions,
    problems: dict[int, RecordError],
) -> None:
    """Downloads and checks images, and writes boxes on them; adds what is wrong to the problems."""
    images = list(found.values())
    items.inspected |= download_images(images, allow_private=options.allow_private_urls)
    items.inspected |= inspect_images(
        (path for path in found if path not in items.inspected),
        rotate=options.rotate,
        inside=options.confine_images,
        looks=options.is_check,
    )
    hint = root_hint(images, items.inspected, records.path, options.image_root)
    for number in _with_bad_images(items):
        index, item = items.columns.record[number], items.given(number)
        problems.setdefault(index, _image_problem(item, records[index], items.inspected, hint))
    for number in items.with_boxes:
        index = items.columns.record[number]
        if index not in problems:
            try:
                items.conversation(number)
            except DataError as error:
                problems[index] = RecordError(error, records[index])


@dataclass(frozen=True)
class _Found:
    """What the records of a file have been found to hold; the images by path."""

    layouts: Counter[str]
    columns: dict[str, None]
    unread: dict[str, None]
    flags: set[str]
    images: dict[Path, ImageRef]

    def add(self, read: ReadRecord) -> None:
        self.layouts[read.layout.title] += 1
        self.columns.update(dict.fromkeys(read.columns))
        self.unread.update(dict.fromkeys(read.unread))
        self.flags.update(read.flags)
        for item in read.conversations:
            for image in item.images:
                self.images.setdefault(image.path, image)


def _read(
    record: Record | RecordError, options: DataOptions, folder: Path, encoder: Encoder | None
) -> ReadRecord:
    if isinstance(record, RecordError):
        raise record
    read = read_record(record, options.reading, folder)
    if encoder is not None:
        try:
            for item in read.conversations:
                encoder.check(item)
        except DataError as error:
            raise RecordError(error, record) from None
    return read


def _with_bad_images(items: Items) -> list[int]:
    """Indices of the conversations that have an image that cannot be used."""
    facts = (items.inspected[path] for path in items.paths)
    bad = [number for number, found in enumerate(facts) if isinstance(found, DataError)]
    if not bad:
        return []
    places = np.flatnonzero(np.isin(np.asarray(items.columns.images), bad))
    owners = np.searchsorted(np.asarray(items.columns.ends), places, side="right")
    numbers: list[int] = np.unique(owners).tolist()
    return numbers


def _image_problem(
    item: Conversation, record: Record, inspected: Inspected, hint: str
) -> RecordError:
    """The problem of the first image of a conversation that cannot be used."""
    image, error = next(
        (image, found)
        for image in item.images
        if isinstance(found := inspected[image.path], DataError)
    )
    if error.message == MISSING:
        error = DataError(MISSING, hint=hint or near_image(image) or error.hint)
    return RecordError(error, record, image.shown)


def for_the_file(file: ReadFile) -> list[RecordError]:
    """The problems of a file; one that all its records have is said once."""
    problems = list(file.problems)
    count = len(file.indices)
    if len(problems) < max(2, count):
        return problems
    first = problems[0]
    layout = [error.cause for error in problems if isinstance(error.cause, LayoutError)]
    if len(layout) == len(problems) and len({error.hint for error in layout}) == 1:
        columns = dict.fromkeys(name for error in layout for name in error.columns)
        found = f"{with_columns(layout[0].found, columns)} (so are all {count} records)"
        return [RecordError(DataError(found, hint=layout[0].hint), first.record)]
    if "all are found" in first.hint and len({error.hint for error in problems}) == 1:
        found = f"{first.message} (nor those of all {count} records)"
        about = first.place.removeprefix(f"{first.record.place}: ")
        return [RecordError(DataError(found, hint=first.hint), first.record, about)]
    return problems


def problems_of(file: ReadFile | UsageError, *, strict: bool) -> list[UsageError]:
    """The problems of a file: for a message if ``strict``, else one for each record."""
    if isinstance(file, UsageError):
        return [file]
    return list(for_the_file(file) if strict else file.problems)


def idle_flags(used: Collection[str], reading: Reading) -> list[UsageError]:
    """The errors of ``--columns`` and ``--prompt`` that decide nothing in what was read.

    Args:
        used: those that decide something, see ReadRecord.
        reading: what they say.
    """
    idle: list[UsageError] = [
        ConfigError(
            f"no record has the column {name!r}",
            place=f"--columns {role}={name}",
            hint="check its name; vlft check lists the columns",
        )
        for role, name in reading.columns.items()
        if f"--columns {role}={name}" not in used
    ]
    if reading.prompt is not None and PROMPT not in used:
        found = "every record has a question of its own"
        idle.append(ConfigError(found, place=PROMPT, hint="leave it out"))
    return idle


def describe(file: ReadFile | UsageError, *, expects_images: bool = True) -> None:
    """Says how a file was read, and that it has no image where images are expected."""
    if isinstance(file, UsageError):
        return
    name = "records given without a file" if is_kept(file.path) else shown(file.path)
    if not is_kept(file.path):
        info(f"{name}: {file.form}")
    if expects_images and len(file.items) and not len(file.items.columns.images):
        count = len(file.items)
        what = "the 1 sample has" if count == 1 else f"none of the {count} samples has"
        warn(f"{name}: {what} {'no' if count == 1 else 'an'} image")
