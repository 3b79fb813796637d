"""Data files -> samples ready to encode. Everything is checked here, before a model is loaded."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, overload

from vlft.console import tracked, warn
from vlft.data.fit import fit
from vlft.data.image_notes import warn_of_images
from vlft.data.records import Record, RecordError
from vlft.data.skipped import in_one_line
from vlft.data.source import ReadFile, describe, idle_flags, problems_of
from vlft.data.special_tokens import warn_of_special_tokens
from vlft.data.specs import expand, read_files
from vlft.data.split import Draws, Position, identity, split_off
from vlft.errors import CollectedError, DataError, UsageError, raise_all, shown

if TYPE_CHECKING:
    from vlft.data.conversation import Conversation
    from vlft.data.encode import EncodedSample, Outline
    from vlft.data.options import DataOptions, Encode
    from vlft.data.source import Inspected

Item = tuple["Conversation", "Outline", Position]


class Dataset(Sequence["EncodedSample"]):
    """Conversations that are encoded on access, because their tensors would need much memory.

    Args:
        items: checked conversations with their outlines and positions.
        encode: of the processor.
        drawn: positions of all records, skipped ones too.
        skipped: why records were skipped, an error for each.
        flags: see ReadRecord.
    """

    def __init__(
        self,
        items: Sequence[Item],
        encode: Encode,
        drawn: Sequence[Position] = (),
        skipped: Sequence[UsageError] = (),
        flags: frozenset[str] = frozenset(),
    ) -> None:
        self._items = tuple(items)
        self.conversations = tuple(conversation for conversation, _, _ in items)
        self.outlines = tuple(outline for _, outline, _ in items)
        self.positions = tuple(position for _, _, position in items)
        self.drawn = tuple(drawn)
        self.skipped = tuple(skipped)
        self.flags = flags
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

    @property
    def as_text(self) -> list[tuple[str, tuple[str, ...]]]:
        """Place and special tokens of each sample that holds some which are read as plain text."""
        pairs = zip(self.conversations, self.outlines, strict=True)
        return [(c.place, outline.as_text) for c, outline in pairs if outline.as_text]

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
    problems, long = list[UsageError](), list[UsageError]()
    inspected = {} if inspected is None else inspected
    strict = options.on_bad_sample == "error"
    read = read_files(expand(files), draws or Draws(options.seed), options, inspected)
    unusable = [file for file in read if isinstance(file, UsageError)]
    for number, file in enumerate(read):
        if isinstance(file, UsageError):
            problems.append(file)
            continue
        drawn += [(number, index) for index in file.indices]
        found, wrong, too_long = _fitted(number, file, encode, options)
        items += found
        problems += sorted([*problems_of(file, strict=strict), *wrong], key=number_of)
        long += too_long
    raise_all(problems if strict else unusable)
    for file in read:
        describe(file)
    if problems:
        warn(in_one_line(problems))
    if not items:
        hint = "correct the records; the warnings above name the first that was skipped"
        place = ", ".join(map(shown, files))
        raise DataError("no usable sample is left", place=place, hint=hint)
    flags = frozenset(flag for file in read if isinstance(file, ReadFile) for flag in file.flags)
    return Dataset(items, encode, drawn, [*problems, *long], flags)


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
    raise_all(idle_flags(train.flags | val.flags, options.reading))
    warn_of_images(train.conversations + val.conversations)
    warn_of_special_tokens(train.as_text + val.as_text)
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


def _fitted(
    number: int, file: ReadFile, encode: Encode, options: DataOptions
) -> tuple[list[Item], list[UsageError], list[UsageError]]:
    """The samples of a file that fit, the problems of others, and those that are too long."""
    good: list[Item] = []
    problems: list[UsageError] = []
    too_long: list[UsageError] = []
    for index, conversation in tracked(file.items, "checking samples", len(file.items)):
        try:
            fitted = fit(conversation, encode, options)
        except DataError as error:
            problems.append(of_conversation(error, conversation))
            continue
        if fitted is None:
            found = DataError(f"more than {options.max_length} tokens")
            too_long.append(of_conversation(found, conversation))
        else:
            good.append((*fitted, (number, index)))
    if too_long:
        samples = "1 sample" if len(too_long) == 1 else f"{len(too_long)} samples"
        warn(f"{shown(file.path)}: skipped {samples} of more than {options.max_length} tokens")
    return good, problems, too_long


def number_of(problem: UsageError) -> int:
    """The number of the record that a problem is of, to sort by."""
    return problem.record.number if isinstance(problem, RecordError) else 0


def of_conversation(error: DataError, conversation: Conversation) -> DataError:
    """The error as one of the record that the conversation was read from."""
    origin = conversation.origin
    if origin is None:
        return error
    return RecordError(error, Record(None, origin.path, origin.line, origin.number))
