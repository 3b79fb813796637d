"""Data files -> samples ready to encode. Everything is checked here, before a model is loaded."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, cast, overload

import numpy as np

from vlft.console import warn
from vlft.data.fit import fit_items
from vlft.data.image_notes import warn_of_images
from vlft.data.receipt import keep_receipt
from vlft.data.records import Record, RecordError
from vlft.data.skipped import in_one_line
from vlft.data.source import ReadFile, describe, idle_flags, problems_of
from vlft.data.special_tokens import warn_of_special_tokens
from vlft.data.specs import expand, read_files
from vlft.data.split import Draws, split_off, with_weight
from vlft.data.store import Lazy, Store, ranges
from vlft.errors import CollectedError, DataError, UsageError, raise_all, shown

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping
    from pathlib import Path

    from vlft.data.conversation import Conversation
    from vlft.data.encode import EncodedImage, EncodedSample
    from vlft.data.encoder import Encoder
    from vlft.data.fit import Fitted
    from vlft.data.items import Inspected
    from vlft.data.options import DataOptions
    from vlft.data.outline import Outline
    from vlft.data.split import Position
    from vlft.data.store import Numbers


class Dataset(Sequence["EncodedSample"]):
    """Samples that are read and encoded on access, because all of them would need much memory.

    Args:
        store: of the samples.
        rows: numbers of those that belong to the set, ascending; None for all.
        drawn: by file, indices of all records that were drawn, skipped ones too.
        skipped: why records were skipped, an error for each.
        flags: see ReadRecord.

    Attributes:
        conversations: read on access, as the others are.
        outlines: see Outline.
        positions: number of the file, and index of the record.
        is_drawn: (S,) bool, whether the reply of a sample is an image.
    """

    def __init__(
        self,
        store: Store,
        rows: Numbers | None = None,
        drawn: Mapping[int, Sequence[int]] | None = None,
        skipped: Sequence[UsageError] = (),
        flags: frozenset[str] = frozenset(),
    ) -> None:
        self.store = store
        self.rows = np.arange(len(store)) if rows is None else rows
        self.drawn, self.skipped, self.flags = drawn or {}, tuple(skipped), flags
        numbers = cast("Sequence[int]", self.rows)
        self.is_drawn: Numbers = store.draws[self.rows]
        self.conversations: Lazy[Conversation] = Lazy(numbers, store.conversation)
        self.outlines: Lazy[Outline] = Lazy(numbers, store.outline)
        self.positions: Lazy[Position] = Lazy(
            numbers, lambda number: divmod(int(store.positions[number]), 1 << 32)
        )

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> EncodedSample: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> EncodedSample | Dataset:
        """An encoded sample, or a dataset of some of them."""
        if isinstance(index, slice):
            return Dataset(self.store, self.rows[index])
        return self.store.sample(int(self.rows[index]))

    @property
    def as_text(self) -> list[tuple[str, tuple[str, ...]]]:
        """Place and special tokens of each sample that holds some which are read as plain text."""
        chosen = np.flatnonzero(self.store.has_special[self.rows])
        items = [self.conversations[index] for index in chosen.tolist()]
        return [(item.place, found) for item in items if (found := self.store.as_text(item))]

    def divide(self, chosen: Collection[int]) -> tuple[Dataset, Dataset]:
        """The samples that are not chosen, and those that are, both in order."""
        is_chosen = np.zeros(len(self), bool)
        is_chosen[list(chosen)] = True
        return tuple(
            Dataset(self.store, self.rows[part], self.drawn, self.skipped, self.flags)
            for part in (~is_chosen, is_chosen)
        )  # type: ignore[return-value]

    @property
    def identities(self) -> Numbers:
        """(S,) equal for samples with the same texts and images."""
        found: Numbers = self.store.identities[self.rows]
        return found

    @property
    def lengths(self) -> Numbers:
        """(S,) tokens of the samples as far as they are known, else -1."""
        found: Numbers = self.store.tokens[self.rows]
        return found

    def shown_images(self) -> tuple[Numbers, Numbers]:
        """For each image of each sample the index of the sample, and the image in the store."""
        ends = self.store.ends
        counts = np.diff(ends, prepend=0)[self.rows]
        places = ranges(ends[self.rows] - counts, counts)
        return np.repeat(np.arange(len(self)), counts), self.store.images[places]

    def images(self) -> list[EncodedImage]:
        """The images of the samples in order, each once by its file and its tiles."""
        owners, images = self.shown_images()
        counts = np.bincount(owners, minlength=len(self))[owners]
        is_last = np.diff(owners, append=len(self)) > 0
        drawn = is_last & self.is_drawn[owners]
        _, first = np.unique(np.stack([images, counts, drawn]), axis=1, return_index=True)
        found = [
            self.store.encoded_image(int(images[i]), int(counts[i]), drawn=bool(drawn[i]))
            for i in np.sort(first)
        ]
        return list({(image.path, image.tiles, image.drawn): image for image in found}.values())

    def with_notes(self) -> list[Conversation]:
        """The first conversation of each image that has something unexpected."""
        owners, images = self.shown_images()
        first = np.sort(np.unique(images, return_index=True)[1])
        noted = [int(owners[i]) for i in first if self.store.has_notes(int(images[i]))]
        return [self.conversations[index] for index in sorted(set(noted))]

    def groups(self) -> list[Hashable]:
        """For each sample the digest of the first image that it shows, else its own index."""
        first = map(self.store.first_image, self.rows.tolist())
        return [
            index if image is None else self.store.digest(image)
            for index, image in enumerate(first)
        ]

    def files(self) -> list[Path]:
        """The data files of the samples."""
        numbers = np.unique(self.store.positions[self.rows] >> 32, return_index=True)[1]
        found = (self.conversations[int(index)].origin for index in numbers)
        return [origin.path for origin in found if origin is not None]


def load_dataset(
    files: Sequence[str],
    encoder: Encoder,
    options: DataOptions,
    inspected: Inspected | None = None,
    draws: Draws | None = None,
) -> Dataset:
    """Reads, checks and mixes data files.

    Args:
        files: paths, each with an optional ``#N`` that draws N of its records.
        encoder: of the checkpoint.
        options: see DataOptions.
        inspected: images that were checked before; those checked here are added.
        draws: what earlier files of the command have drawn; those of these files are added.

    Raises:
        UsageError: every problem of all files, or that no sample is left.
    """
    known = {} if inspected is None else inspected
    read = read_files(expand(files), draws or Draws(options.seed), options, known, encoder)
    strict = options.on_bad_sample == "error"
    unusable = [file for file in read if isinstance(file, UsageError)]
    good = {n: file for n, file in enumerate(read) if isinstance(file, ReadFile)}
    fitted = {n: fit_items(file.items, encoder, options) for n, file in good.items()}
    long = [error for n, file in good.items() for error in too_long(file, fitted[n], options)]
    problems: list[UsageError] = []
    for number, file in enumerate(read):
        wrong = misfits(good[number], fitted[number]) if number in good else []
        problems += sorted([*problems_of(file, strict=strict), *wrong], key=number_of)
    raise_all(problems if strict else unusable)
    for file in read:
        describe(file, expects_images=options.expects_images)
    if problems:
        warn(in_one_line(problems))
    if not any(len(part.index) for part in fitted.values()):
        hint = "correct the records; the warnings above name the first that was skipped"
        place = ", ".join(map(shown, files))
        raise DataError("no usable sample is left", place=place, hint=hint)
    for number, file in good.items():
        keep_receipt(file, fitted[number], options, encoder)
    store = Store(good, fitted, encoder, need_response=options.reading.need_response)
    drawn = {number: file.indices for number, file in good.items()}
    flags = frozenset(flag for file in good.values() for flag in file.flags)
    return Dataset(store, None, drawn, [*problems, *long], flags)


def load_train_and_val(
    files: Sequence[str],
    val_files: Sequence[str],
    val_ratio: float,
    encoder: Encoder,
    options: DataOptions,
) -> tuple[Dataset, Dataset]:
    """The training and the validation set of a run; validation is empty if none is asked for.

    Args:
        files: training data.
        val_files: validation data; if empty, ``val_ratio`` of the training data is split off.
        val_ratio: 0 for no validation.
        encoder: of the checkpoint.
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
            data = Dataset(Store({}, {}, encoder, need_response=True))
            if group:
                data = load_dataset(group, encoder, options, inspected, draws)
            loaded.append(data)
        except CollectedError as error:
            problems += error.problems
        except UsageError as error:
            problems.append(error)
    raise_all(problems)
    train, val = loaded
    train = with_weight(train)
    raise_all(idle_flags(train.flags | val.flags, options.reading))
    warn_of_images([*train.with_notes(), *val.with_notes()])
    warn_of_special_tokens(train.as_text + val.as_text)
    has_history = options.history.validation is not None
    if not val_files and (len(train) > 1 or has_history) and val_ratio > 0:
        return _split(train, val_ratio, options)
    repeated = int(np.isin(val.identities, train.identities).sum())
    if repeated:
        warn(f"{repeated} of {len(val)} validation records are training records too")
    return train, val


def _split(data: Dataset, ratio: float, options: DataOptions) -> tuple[Dataset, Dataset]:
    """Training and validation part: as the run has decided before, else drawn."""
    history = options.history
    if history.validation is not None:
        before = [(file << 32) + record for file, record in history.validation]
        return data.divide(np.flatnonzero(np.isin(data.store.positions, before)).tolist())
    if history.older_release:
        count = min(max(1, round(len(data) * ratio)), len(data) - 1)
        return data.divide(set(random.Random(options.seed).sample(range(len(data)), count)))
    train, val = data.divide(split_off(data, ratio, options.seed))
    trained = {image.digest for image in train.images()}
    owners, images = val.shown_images()
    is_known = np.array([data.store.digest(image) in trained for image in images.tolist()], bool)
    known = len(np.unique(owners[is_known]))
    if known:
        warn(f"{known} of {len(val)} validation records have an image that is trained on, too")
    return train, val


def misfits(file: ReadFile, fitted: Fitted) -> list[DataError]:
    """The problems of the conversations of a file that cannot be samples."""
    found = fitted.problems.items()
    return [of_conversation(error, file.items.conversation(index)) for index, error in found]


def too_long(file: ReadFile, fitted: Fitted, options: DataOptions) -> list[DataError]:
    """The conversations of a file that are left out for their length; says how many."""
    if not fitted.too_long:
        return []
    found, count = DataError(f"more than {options.max_length} tokens"), len(fitted.too_long)
    samples = "1 sample" if count == 1 else f"{count} samples"
    warn(f"{shown(file.path)}: skipped {samples} of more than {options.max_length} tokens")
    return [of_conversation(found, file.items.conversation(i)) for i in fitted.too_long]


def number_of(problem: UsageError) -> int:
    """The number of the record that a problem is of, to sort by."""
    return problem.record.number if isinstance(problem, RecordError) else 0


def of_conversation(error: DataError, conversation: Conversation) -> DataError:
    """The error as one of the record that the conversation was read from."""
    origin = conversation.origin
    if origin is None:
        return error
    return RecordError(error, Record(None, origin.path, origin.line, origin.number))
