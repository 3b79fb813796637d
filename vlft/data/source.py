"""A data file read: its conversations, its problems, and what was found of its form."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vlft.console import info, tracked, warn
from vlft.data.boxes import write_boxes
from vlft.data.download import download_images
from vlft.data.images import inspect_images
from vlft.data.in_memory import image_folder
from vlft.data.layouts.ask import LayoutError, with_columns
from vlft.data.layouts.question import PROMPT
from vlft.data.missing import near_image, root_of
from vlft.data.read import read_record
from vlft.data.records import RecordError
from vlft.errors import ConfigError, DataError, UsageError, shown

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from vlft.data.conversation import Conversation, ImageFacts, ImageRef
    from vlft.data.options import DataOptions, Reading
    from vlft.data.read import ReadRecord
    from vlft.data.records import Record, Records

Inspected = dict["Path", "ImageFacts | DataError"]
MISSING = "no such image"


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
    """

    path: Path
    form: Form
    items: tuple[tuple[int, Conversation], ...]
    problems: tuple[RecordError, ...]
    indices: tuple[int, ...]
    flags: frozenset[str]


def read_file(
    records: Records, indices: Sequence[int], options: DataOptions, inspected: Inspected
) -> ReadFile:
    """The conversations of some records of a file.

    Args:
        records: of the file.
        indices: of those that are read.
        options: see DataOptions.
        inspected: images that were checked before; those checked here are added.
    """
    path = records.path
    folder = options.image_root or image_folder(path)
    read: list[tuple[int, ReadRecord]] = []
    problems: dict[int, RecordError] = {}
    for index in tracked(indices, f"reading {path.name}", len(indices)):
        try:
            read.append((index, _read(records[index], options, folder)))
        except RecordError as error:
            problems[index] = error
    found = [(index, item) for index, made in read for item in made.conversations]
    images = [image for _, item in found for image in item.images]
    inspected |= download_images(images, allow_private=options.allow_private_urls)
    inspected |= inspect_images(
        (ref.path for ref in images if ref.path not in inspected),
        rotate=options.rotate,
        inside=options.confine_images,
    )
    hint = _root_hint(images, inspected, path, options.image_root)
    items: list[tuple[int, Conversation]] = []
    for index, item in found:
        try:
            items.append((index, _with_facts(item, records[index], inspected, hint)))
        except RecordError as error:
            problems.setdefault(index, error)
    items = [(index, item) for index, item in items if index not in problems]
    ordered = tuple(problems[index] for index in sorted(problems))
    form = _form(records, [made for _, made in read])
    flags = frozenset(flag for _, made in read for flag in made.flags)
    return ReadFile(path, form, tuple(items), ordered, tuple(indices), flags)


def _read(record: Record | RecordError, options: DataOptions, folder: Path) -> ReadRecord:
    if isinstance(record, RecordError):
        raise record
    return read_record(record, options.reading, folder)


def _form(records: Records, read: Sequence[ReadRecord]) -> Form:
    layouts = Counter(made.layout.title for made in read)
    columns = dict.fromkeys(name for made in read for name in made.columns)
    unread = dict.fromkeys(name for made in read for name in made.unread)
    return Form(records.kind, records.note, tuple(layouts), tuple(columns), tuple(unread))


def _with_facts(
    item: Conversation, record: Record, inspected: Inspected, hint: str
) -> Conversation:
    """The conversation with the facts about its images.

    Raises:
        RecordError: an image cannot be used.
    """

    def with_facts(image: ImageRef) -> ImageRef:
        facts = inspected[image.path]
        if isinstance(facts, DataError):
            if facts.message == MISSING:
                facts = DataError(MISSING, hint=hint or near_image(image) or facts.hint)
            raise RecordError(facts, record, image.shown)
        return replace(image, facts=facts)

    try:
        return write_boxes(item.map_images(with_facts))
    except DataError as error:
        raise error if isinstance(error, RecordError) else RecordError(error, record) from None


def _root_hint(
    images: Sequence[ImageRef], inspected: Inspected, path: Path, image_root: Path | None
) -> str:
    """Where all images of a file are, if some are not where they should be."""
    local = [image for image in images if image.address is None]
    if image_root is not None or not any(_is_missing(inspected[ref.path]) for ref in local):
        return ""
    root = root_of(local, path)
    return f"from {root} all are found: add --image-root {root}" if root else ""


def _is_missing(facts: ImageFacts | DataError) -> bool:
    return isinstance(facts, DataError) and facts.message == MISSING


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


def describe(file: ReadFile | UsageError) -> None:
    """Says how a file was read, and that it has no image."""
    if isinstance(file, UsageError):
        return
    info(f"{shown(file.path)}: {file.form}")
    if file.items and not any(item.images for _, item in file.items):
        count = len(file.items)
        what = "the 1 sample has" if count == 1 else f"none of the {count} samples has"
        warn(f"{shown(file.path)}: {what} {'no' if count == 1 else 'an'} image")
