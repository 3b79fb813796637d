"""The samples of a run: where they stand, their images and lengths; encoded when they are needed.

A sample takes about sixty bytes here. Beside them, the conversations, outlines and samples that
were used last are kept, as many as a small data set has.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from vlft.data.outline import outline

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from vlft.data.conversation import Conversation, ImageFacts
    from vlft.data.encode import EncodedImage, EncodedSample
    from vlft.data.encoder import Encoder
    from vlft.data.fit import Fitted
    from vlft.data.outline import Outline
    from vlft.data.source import ReadFile

    Numbers = np.ndarray[Any, np.dtype[np.int64]]

T = TypeVar("T")
OUTLINES_KEPT, SAMPLES_KEPT = 20_000, 512


class Lazy(Sequence[T]):
    """A sequence whose items are made when they are asked for."""

    def __init__(self, numbers: Sequence[int], make: Callable[[int], T]) -> None:
        self._numbers, self._make = numbers, make

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        """An item, or a list of some."""
        if isinstance(index, slice):
            return [self._make(int(number)) for number in self._numbers[index]]
        return self._make(int(self._numbers[index]))

    def __iter__(self) -> Iterator[T]:
        return (self._make(int(number)) for number in self._numbers)


class Kept(OrderedDict[int, T]):
    """The values that were used last."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def get_or(self, key: int, make: Callable[[int], T]) -> T:
        """The value of a key, made if it is not kept."""
        value = self.pop(key) if key in self else make(key)
        if len(self) >= self._most:
            self.popitem(last=False)
        self[key] = value
        return value


class Store:
    """The samples of some data files, by number.

    Args:
        files: by number.
        fitted: which of their conversations are samples, by the number of the file.
        encoder: of the checkpoint.
        need_response: whether the reply is part of a sample.

    Attributes:
        positions: (S,) number of the file times 2^32, and index of the record.
        has_special: (S,) whether a sample may hold special tokens that are plain text.
        tokens: (S,) lengths as far as they are known, else -1.
        weights: (S,) of the records.
        identities: (S,) equal for samples with the same texts and images.
        ends: (S,) index into ``images`` one past the last image of the sample.
        images: images of all samples, as indices into ``paths``.
        draws: (S,) whether the last image of the sample is its reply.
        paths: of the distinct image files.
    """

    def __init__(
        self,
        files: Mapping[int, ReadFile],
        fitted: Mapping[int, Fitted],
        encoder: Encoder,
        *,
        need_response: bool,
    ) -> None:
        self.encoder, self.need_response = encoder, need_response
        # A thread encodes the next step while the main one validates; both change what is kept.
        self._lock = threading.RLock()
        parts = fitted.values()
        self._items = [file.items for file in files.values()]
        self._starts = np.cumsum([0, *(len(part.index) for part in parts)])
        self._index = joined(np.int32, [part.index for part in parts])
        self._dropped = joined(np.int16, [part.dropped for part in parts])
        self.tokens = joined(np.int32, [part.tokens for part in parts])
        records = [np.asarray(items.columns.record, np.int64) for items in self._items]
        chosen = zip(fitted.items(), records, strict=True)
        self.positions = joined(np.int64, [(n << 32) + r[part.index] for (n, part), r in chosen])
        weights = (np.asarray(items.columns.weight) for items in self._items)
        pairs = zip(parts, weights, strict=True)
        self.weights = joined(np.float64, [found[part.index] for part, found in pairs])
        self.has_special = joined(
            bool,
            [
                np.isin(part.index, list(file.items.special))
                for part, file in zip(parts, files.values(), strict=True)
            ],
        )
        draws = [np.asarray(items.columns.draws, bool) for items in self._items]
        chosen_draws = zip(parts, draws, strict=True)
        self.draws = joined(bool, [of_file[part.index] for part, of_file in chosen_draws])
        self.paths: list[Path] = []
        self._facts: list[ImageFacts] = []
        self._find_images()
        self.identities = joined(np.int64, [np.fromiter(self._identities(), np.int64)])
        self._views: dict[tuple[int, int, bool], EncodedImage] = {}
        self._outlines: Kept[Outline] = Kept(OUTLINES_KEPT)
        self._samples: Kept[EncodedSample] = Kept(SAMPLES_KEPT)

    def __len__(self) -> int:
        return len(self._index)

    def conversation(self, number: int) -> Conversation:
        """The conversation of a sample, without the exchanges that do not fit."""
        items, index = self._place(number)
        with self._lock:
            item: Conversation = items.conversation(index)
        dropped = int(self._dropped[number])
        return item.without_first_exchanges(dropped) if dropped else item

    def sample(self, number: int) -> EncodedSample:
        """A sample, encoded."""
        with self._lock:
            return self._samples.get_or(number, self._encode)

    def outline(self, number: int) -> Outline:
        """What the rows of a sample are planned from."""
        with self._lock:
            return self._outlines.get_or(number, self._outline)

    def most_tokens(self, number: int) -> int | None:
        """An upper bound of a sample's tokens, without tokenising it; None if there is none."""
        items, index = self._place(number)
        start = self.ends[number - 1] if number else 0
        shown = self.images[start : self.ends[number]].tolist()
        drawn = len(shown) - 1 if self.draws[number] else None
        images = [
            self.encoded_image(image, len(shown), drawn=place == drawn)
            for place, image in enumerate(shown)
        ]
        return self.encoder.most_tokens(items.extent(index), images)

    def encoded_image(self, image: int, count: int, *, drawn: bool) -> EncodedImage:
        """An image of a sample with ``count`` images, which is its reply if it is ``drawn``."""
        key = (image, count, drawn)
        if key not in self._views:
            path, facts = self.paths[image], self._facts[image]
            self._views[key] = self.encoder.image(path, facts, count, drawn=drawn)
        return self._views[key]

    def digest(self, image: int) -> str:
        """The SHA-256 of an image file."""
        return self._facts[image].digest

    def has_notes(self, image: int) -> bool:
        """Whether there is something unexpected about an image."""
        return bool(self._facts[image].notes)

    def first_image(self, number: int) -> int | None:
        """The first image that a sample shows, None if there is none or only a drawn one."""
        start = self.ends[number - 1] if number else 0
        shown = start < self.ends[number] - self.draws[number]
        return int(self.images[start]) if shown else None

    def as_text(self, item: Conversation) -> tuple[str, ...]:
        """The special tokens of a conversation that are read as plain text."""
        return self.encoder.as_text(item if self.need_response else item.without_reply())

    def _encode(self, number: int) -> EncodedSample:
        item = self.conversation(number)
        return self.encoder.encode(item if self.need_response else item.without_reply())

    def _outline(self, number: int) -> Outline:
        made = outline(self.sample(number), self.encoder.image_token_id)
        self.tokens[number] = made.tokens
        return made

    def _place(self, number: int) -> tuple[Any, int]:
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._items[file], int(self._index[number])

    def _find_images(self) -> None:
        """Numbers the distinct files of all data files, and the images of the samples."""
        numbers: dict[Path, int] = {}
        images: list[Numbers] = []
        counts: list[Numbers] = []
        for file, items in enumerate(self._items):
            chosen = slice(self._starts[file], self._starts[file + 1])
            ends = np.asarray(items.columns.ends, np.int64)
            count = np.diff(ends, prepend=0)[self._index[chosen]]
            stop = ends[self._index[chosen]]
            for place in np.flatnonzero(self._dropped[chosen]):
                number = int(self._starts[file] + place)
                count[place] = len(self.conversation(number).images)
            shown = np.asarray(items.columns.images)[ranges(stop - count, count)]
            of_store = np.zeros(len(items.paths), np.int32)
            for image in np.unique(shown).tolist():
                of_store[image] = numbers.setdefault(items.paths[image], len(numbers))
                if len(numbers) > len(self.paths):
                    self.paths.append(items.paths[image])
                    self._facts.append(items.facts(image))
            images.append(of_store[shown])
            counts.append(count)
        self.images = joined(np.int32, images)
        self.ends = np.cumsum(joined(np.int64, counts))

    def _identities(self) -> Iterator[Hashable]:
        from vlft.data.items import text_hash

        start = 0
        for number, end in enumerate(self.ends.tolist()):
            items, index = self._place(number)
            text = items.columns.text[index]
            if self._dropped[number]:
                text = text_hash(self.conversation(number))
            yield hash((text, *(self._facts[i].digest for i in self.images[start:end].tolist())))
            start = end


def joined(kind: Any, parts: Sequence[Any]) -> Any:
    """The arrays end to end, with elements of one type."""
    return np.concatenate([np.zeros(0, kind), *parts]).astype(kind, copy=False)


def ranges(starts: Any, counts: Any) -> Any:
    """The numbers from each start on, as many as its count, end to end."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))
