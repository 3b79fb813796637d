"""The conversations of a data file: where they stand and what bounds them; read when needed."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlft.data.boxes import write_boxes
from vlft.data.conversation import ImageRef
from vlft.data.encoder import Extent
from vlft.data.read import read_record
from vlft.data.receipt import COLUMNS
from vlft.data.records import RecordError
from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlft.data.conversation import Conversation, ImageFacts
    from vlft.data.options import Reading
    from vlft.data.read import ReadRecord
    from vlft.data.receipt import Receipt
    from vlft.data.records import Record, Records

Inspected = dict["Path", "ImageFacts | DataError"]
# Conversations that are kept once they are read; each takes a few kilobytes.
KEPT = 10_000
# Bytes of a box as a text, with tags of its own.
LONGEST_BOX = 48


@dataclass
class Columns:
    """What is known of some conversations, about forty bytes for each.

    Attributes:
        record: index of the record in the file.
        part: which conversation of the record it is, from 0.
        size: bytes of the texts.
        turns: number of turns; negative if there is a system prompt of its own.
        text: hash of system prompt, roles, texts and boxes, images as a mark.
        weight: of its record.
        ends: index into ``images`` one past the last image.
        draws: 1 if the last image is the reply, else 0.
        images: indices into a list of paths.
    """

    record: array[int] = field(default_factory=lambda: array("i"))
    part: array[int] = field(default_factory=lambda: array("i"))
    size: array[int] = field(default_factory=lambda: array("i"))
    turns: array[int] = field(default_factory=lambda: array("i"))
    text: array[int] = field(default_factory=lambda: array("Q"))
    weight: array[float] = field(default_factory=lambda: array("d"))
    ends: array[int] = field(default_factory=lambda: array("q"))
    draws: array[int] = field(default_factory=lambda: array("b"))
    images: array[int] = field(default_factory=lambda: array("i"))


class Items(Sequence[tuple[int, "Conversation"]]):
    """The conversations of a data file, each with the index of its record.

    Args:
        records: of the file.
        reading: see Reading.
        folder: where relative image paths start.
        inspected: see below.

    Attributes:
        inspected: facts of the images, or why they cannot be used, by path.
        columns: see Columns.
        paths: of the distinct image files.
        special: indices of the conversations that may hold special tokens that are plain text.
        with_boxes: indices of those that were added with boxes.
        fitting: (S,) tokens as far as they are known, else -1, if all are known to fit; else None.
    """

    def __init__(
        self, records: Records, reading: Reading, folder: Path, inspected: Inspected
    ) -> None:
        self.columns = Columns()
        self.paths: list[Path] = []
        self.special: set[int] = set()
        self.with_boxes: list[int] = []
        self.fitting: Any = None
        self.records, self._reading, self._folder = records, reading, folder
        self.inspected = inspected
        self._numbers: dict[Path, int] = {}
        self._kept: OrderedDict[int, Conversation] = OrderedDict()

    def __len__(self) -> int:
        return len(self.columns.record)

    def __getitem__(self, index: Any) -> Any:
        """The index of a record, and the conversation with the facts of its images.

        Raises:
            RecordError: the file has changed since the conversation was added.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        return self.columns.record[index], self.conversation(index)

    def __iter__(self) -> Iterator[tuple[int, Conversation]]:
        return (self[number] for number in range(len(self)))

    def add(self, record: int, read: ReadRecord) -> None:
        """Adds the conversations of a record, whose images need not have been checked yet."""
        columns = self.columns
        for part, item in enumerate(read.conversations):
            columns.record.append(record)
            columns.part.append(part)
            extent = extent_of(item)
            columns.size.append(extent.size)
            columns.turns.append(-extent.turns if extent.has_system else extent.turns)
            columns.text.append(text_hash(item))
            columns.weight.append(read.weight)
            for image in item.images:
                columns.images.append(self._numbers.setdefault(image.path, len(self._numbers)))
                if len(self._numbers) > len(self.paths):
                    self.paths.append(image.path)
            columns.ends.append(len(columns.images))
            columns.draws.append(item.drawn is not None)
            if any(turn.boxes for turn in item.turns):
                self.with_boxes.append(len(columns.record) - 1)
            if len(self._kept) < KEPT:
                self._kept[len(columns.record) - 1] = item

    def restore(self, receipt: Receipt) -> None:
        """Takes the conversations from a receipt in the place of the file."""
        for name in COLUMNS:
            column = getattr(self.columns, name)
            column.frombytes(receipt.arrays[name].astype(column.typecode).tobytes())
        self.paths = [Path(image[0]) for image in receipt.meta["images"]]
        self._numbers = {path: number for number, path in enumerate(self.paths)}
        self.special = set(receipt.meta["special"])
        self.fitting = receipt.arrays["tokens"]
        known = receipt.known_images()
        for path in self.paths:
            if path in known:
                self.inspected.setdefault(path, known[path])
            if self.inspected.get(path) != known.get(path) or path not in known:
                self.with_boxes, self.fitting = list(receipt.meta["with_boxes"]), None

    def images_of(self, index: int) -> array[int]:
        """The images of a conversation, as indices into ``paths``."""
        start = self.columns.ends[index - 1] if index else 0
        return self.columns.images[start : self.columns.ends[index]]

    def extent(self, index: int) -> Extent:
        """The sizes that give an upper bound of a conversation's token count."""
        turns = self.columns.turns[index]
        return Extent(self.columns.size[index], abs(turns), turns < 0)

    def facts(self, image: int) -> ImageFacts:
        """The facts of an image that is used."""
        found = self.inspected[self.paths[image]]
        if isinstance(found, DataError):
            raise ValueError("the image cannot be used")
        return found

    def conversation(self, index: int) -> Conversation:
        """A conversation with the facts of its images."""
        item = self.given(index)
        if any(image.facts is None for image in item.images):
            item = self._kept[index] = write_boxes(item.map_images(self._with_facts))
        return item

    def given(self, index: int) -> Conversation:
        """A conversation as it was read or, if it was used before, with the facts."""
        item = self._kept.pop(index, None)
        if item is None:
            item = self._read(index)
            if len(self._kept) >= KEPT:
                self._kept.popitem(last=False)
        self._kept[index] = item
        return item

    def note_special(self, count: int) -> None:
        """Notes that the last conversations hold special tokens that are plain text."""
        self.special.update(range(len(self) - count, len(self)))

    def keep_only(self, is_kept: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        """Drops the other conversations."""
        if is_kept.all():
            return
        old = self.columns
        counts = np.diff(np.asarray(old.ends), prepend=0)
        kept = Columns()
        for name in ("record", "part", "size", "turns", "text", "weight", "draws"):
            values = getattr(old, name)
            column = array(values.typecode)
            column.frombytes(np.asarray(values)[is_kept].tobytes())
            setattr(kept, name, column)
        kept.ends.frombytes(np.cumsum(counts[is_kept]).astype(np.int64).tobytes())
        kept.images.frombytes(np.asarray(old.images)[np.repeat(is_kept, counts)].tobytes())
        new = np.cumsum(is_kept) - 1
        items = [(int(new[i]), item) for i, item in self._kept.items() if is_kept[i]]
        self.columns, self._kept = kept, OrderedDict(items)
        self.special = {int(new[index]) for index in self.special if is_kept[index]}
        self.with_boxes = [int(new[index]) for index in self.with_boxes if is_kept[index]]

    def _with_facts(self, image: ImageRef) -> ImageRef:
        found = self.inspected.get(image.path)
        return image if isinstance(found, DataError) else replace(image, facts=found)

    def _read(self, index: int) -> Conversation:
        record: Record | RecordError = self.records[self.columns.record[index]]
        changed = DataError(
            "the data file has changed since it was checked",
            hint="put the old file back and go on with --resume, or start again",
        )
        if isinstance(record, RecordError):
            raise RecordError(changed, record.record)
        try:
            read = read_record(record, self._reading, self._folder)
            item = read.conversations[self.columns.part[index]]
        except (RecordError, IndexError):
            raise RecordError(changed, record) from None
        if text_hash(item) != self.columns.text[index]:
            raise RecordError(changed, record)
        return item


def extent_of(item: Conversation) -> Extent:
    """The sizes that give an upper bound of a conversation's token count."""
    size = sum(
        len(part) if part.isascii() else len(part.encode())
        for turn in item.turns
        for part in turn.parts
        if isinstance(part, str)
    )
    size += LONGEST_BOX * sum(len(turn.boxes) for turn in item.turns)
    return Extent(
        size + len((item.system or "").encode()), len(item.turns), item.system is not None
    )


def text_hash(item: Conversation) -> int:
    """64 bits, equal for conversations with the same texts, boxes, and images at the same places.

    Boxes are compared by their numbers as given, or as they stand in the texts once they are
    written.
    """
    parts = [item.system if item.system is not None else "\0"]
    for turn in item.turns:
        parts.append(f"\0{turn.role}")
        parts += ("\0" if isinstance(part, ImageRef) else part for part in turn.parts)
        parts += (f"\0{b.kind}{b.corners}{item.images.index(b.image)}" for b in turn.boxes)
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")
