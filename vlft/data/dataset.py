"""Data files -> samples ready to encode. Everything is checked here, before a model is loaded."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

from vlft.console import tracked, warn
from vlft.data.conversation import Origin
from vlft.data.download import download_images
from vlft.data.fit import fit
from vlft.data.image_notes import warn_of_images
from vlft.data.images import inspect_images
from vlft.data.layouts import IGNORED, native
from vlft.data.records import FORMATS, Record, read_records
from vlft.data.skipped import in_one_line
from vlft.data.split import Draws, Position, identity, split_off
from vlft.errors import CollectedError, DataError, UsageError, raise_all, shown

if TYPE_CHECKING:
    from vlft.data.conversation import Conversation, ImageFacts, ImageRef
    from vlft.data.encode import EncodedSample, Outline
    from vlft.data.options import DataOptions, Encode

Item = tuple["Conversation", "Outline", Position]
Inspected = dict[Path, "ImageFacts | DataError"]

SAMPLED = re.compile(f"(.+(?:{'|'.join(map(re.escape, FORMATS))}))#(.*)", re.IGNORECASE | re.DOTALL)


class Dataset(Sequence["EncodedSample"]):
    """Conversations that are encoded on access, because their tensors would need much memory.

    Args:
        items: checked conversations with their outlines and positions.
        encode: of the processor.
        drawn: positions of all records, skipped ones too.
        skipped: why records were skipped, an error for each.
    """

    def __init__(
        self,
        items: Sequence[Item],
        encode: Encode,
        drawn: Sequence[Position] = (),
        skipped: Sequence[UsageError] = (),
    ) -> None:
        self._items = tuple(items)
        self.conversations = tuple(conversation for conversation, _, _ in items)
        self.outlines = tuple(outline for _, outline, _ in items)
        self.positions = tuple(position for _, _, position in items)
        self.drawn = tuple(drawn)
        self.skipped = tuple(skipped)
        self._encode = encode

    def __len__(self) -> int:
        return len(self.conversations)

    @overload
    def __getitem__(self, index: int) -> EncodedSample: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> EncodedSample | Dataset:
        """An encoded sample, or a dataset of some of them."""
        if isinstance(index, slice):
            return Dataset(self._items[index], self._encode)
        return self._encode(self.conversations[index])

    def divide(self, chosen: Collection[int]) -> tuple[Dataset, Dataset]:
        """The samples that are not chosen, and those that are, both in order."""
        parts: tuple[list[Item], list[Item]] = ([], [])
        for index, item in enumerate(self._items):
            parts[index in chosen].append(item)
        train, val = (Dataset(part, self._encode, (), self.skipped) for part in parts)
        return train, val


def load_dataset(
    files: Sequence[str],
    encode: Encode,
    options: DataOptions,
    inspected: Inspected | None = None,
    draws: Draws | None = None,
) -> Dataset:
    """Reads, checks and mixes data files.

    Args:
        files: paths, each with an optional ``#N`` that draws N of its records.
        encode: of the processor; called once per conversation, to know its length.
        options: see DataOptions.
        inspected: images that were checked before; those checked here are added.
        draws: what earlier files of the command have drawn; those of these files are added.

    Raises:
        UsageError: every problem of all files, or that no sample is left.
    """
    items: list[Item] = []
    drawn: list[Position] = []
    problems, unusable, long = list[UsageError](), list[UsageError](), list[UsageError]()
    inspected = {} if inspected is None else inspected
    draws = draws or Draws(options.seed)
    for number, spec in enumerate(files):
        try:
            records = [((number, index), record) for index, record in _read_file(spec, draws)]
            drawn += [position for position, _ in records]
            found, wrong, too_long = _check_records(spec, records, encode, options, inspected)
        except UsageError as error:
            problems.append(error)
            unusable.append(error)
            continue
        items += found
        problems, long = problems + wrong, long + too_long
    raise_all(problems if options.on_bad_sample == "error" else unusable)
    if problems:
        warn(in_one_line(problems))
    if not items:
        raise DataError(
            "no usable sample is left",
            place=", ".join(map(shown, files)),
            hint="correct the records; the warnings above name the first that was skipped",
        )
    return Dataset(items, encode, drawn, [*problems, *long])


def load_train_and_val(
    files: Sequence[str],
    val_files: Sequence[str],
    val_ratio: float,
    encode: Encode,
    options: DataOptions,
) -> tuple[Dataset, Dataset]:
    """The training and the validation set of a run; validation is empty if none is asked for.

    Args:
        files: training data.
        val_files: validation data; if empty, ``val_ratio`` of the training data is split off.
        val_ratio: 0 for no validation.
        encode: of the processor.
        options: see DataOptions; the seed draws samples and the split.

    Raises:
        UsageError: every problem of every record of all files.
    """
    problems: list[UsageError] = []
    inspected: Inspected = {}
    draws = Draws(options.seed, options.history.older_release)
    loaded = []
    for group in (files, val_files):
        try:
            data = Dataset((), encode)
            if group:
                data = load_dataset(group, encode, options, inspected, draws)
            loaded.append(data)
        except CollectedError as error:
            problems += error.problems
        except UsageError as error:
            problems.append(error)
    raise_all(problems)
    train, val = loaded
    warn_of_images(train.conversations + val.conversations)
    if not val_files and len(train) > 1 and val_ratio > 0:
        return _split(train, val_ratio, options)
    trained = set(map(identity, train.outlines))
    repeated = sum(identity(outline) in trained for outline in val.outlines)
    if repeated:
        warn(f"{repeated} of {len(val)} validation records are training records too")
    return train, val


def _split(data: Dataset, ratio: float, options: DataOptions) -> tuple[Dataset, Dataset]:
    """Training and validation part: as the run has decided before, else drawn."""
    history = options.history
    if history.validation is not None:
        before = set(history.validation)
        return data.divide({i for i, place in enumerate(data.positions) if place in before})
    if history.older_release:
        count = min(max(1, round(len(data) * ratio)), len(data) - 1)
        return data.divide(set(random.Random(options.seed).sample(range(len(data)), count)))
    train, val = data.divide(
        split_off(data.positions, data.outlines, data.drawn, ratio, options.seed)
    )
    trained = {image.digest for outline in train.outlines for image in outline.images}
    known = sum(
        any(image.digest in trained for image in outline.images) for outline in val.outlines
    )
    if known:
        warn(f"{known} of {len(val)} validation records have an image that is trained on, too")
    return train, val


def _read_file(spec: str, draws: Draws) -> list[tuple[int, Record | DataError]]:
    """The records of a file that are used, each with its number in the file."""
    path, count = parse_spec(spec)
    records = list(read_records(path))
    if not records:
        raise DataError("no records", place=shown(path), hint="add some, or leave it out")
    return [(index, records[index]) for index in draws.take(path, len(records), count, spec)]


def _check_records(
    spec: str,
    records: Sequence[tuple[Position, Record | DataError]],
    encode: Encode,
    options: DataOptions,
    inspected: Inspected,
) -> tuple[list[Item], list[UsageError], list[UsageError]]:
    """The usable records of a file, the problems of others, and those that are too long."""
    parsed = [(position, _parse(record, options)) for position, record in records]
    images = [
        image for _, item in parsed if not isinstance(item, UsageError) for image in item.images
    ]
    inspected |= download_images(images, allow_private=options.allow_private_urls)
    inspected |= inspect_images(
        (ref.path for ref in images if ref.path not in inspected),
        rotate=options.rotate,
        inside=options.confine_images,
    )
    good: list[Item] = []
    problems: list[UsageError] = []
    too_long: list[UsageError] = []
    for position, item in tracked(parsed, "checking samples", len(parsed)):
        try:
            conversation = _checked(item, inspected)
            fitted = fit(conversation, encode, options)
        except UsageError as error:
            problems.append(error)
            continue
        if fitted is None:
            found = f"more than {options.max_length} tokens"
            too_long.append(DataError(found, place=conversation.place))
        else:
            good.append((*fitted, position))
    if too_long:
        samples = "1 sample" if len(too_long) == 1 else f"{len(too_long)} samples"
        warn(f"{shown(spec)}: skipped {samples} of more than {options.max_length} tokens")
    return good, problems, too_long


def parse_spec(spec: str) -> tuple[Path, int | None]:
    """The file, and how many of its records to draw; a ``#`` may be part of the file's name."""
    parts = SAMPLED.fullmatch(spec)
    if parts is None or Path(spec).exists():
        return Path(spec), None
    name, count = parts.groups()
    if not re.fullmatch(r"0*[1-9][0-9]{0,9}", count):
        raise DataError(
            f"found #{count} after the name",
            place=shown(spec),
            hint="write FILE#N for N of its records, N from 1 on, or FILE for all",
        )
    return Path(name), int(count)


def _parse(record: Record | DataError, options: DataOptions) -> Conversation | UsageError:
    if isinstance(record, DataError):
        return record
    try:
        conversation = native(
            record.fields,
            place=record.place,
            folder=options.image_root or record.path.parent,
            image_tag=options.image_tag,
            need_response=options.need_response,
        )
        rest = (record.fields.get(name) for name in IGNORED)
        return replace(conversation, origin=Origin(record.path, record.line, *rest))
    except DataError as error:
        return error


def _checked(item: Conversation | UsageError, inspected: Inspected) -> Conversation:
    """The conversation with the facts about its images; raises the error of the record if any."""
    if isinstance(item, UsageError):
        raise item

    def with_facts(image: ImageRef) -> ImageRef:
        facts = inspected[image.path]
        if isinstance(facts, DataError):
            place = f"{item.place}: {image.shown}"
            raise DataError(facts.message, place=place, hint=facts.hint)
        return replace(image, facts=facts)

    return item.map_images(with_facts)
