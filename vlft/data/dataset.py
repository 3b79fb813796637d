"""Data files -> samples ready to encode. Everything is checked here, before a model is loaded."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

from vlft.console import tracked, warn
from vlft.data.encode import outline
from vlft.data.images import inspect_images
from vlft.data.layouts import native
from vlft.data.records import FORMATS, Record, read_records
from vlft.errors import CollectedError, DataError, UsageError, raise_all, shown

if TYPE_CHECKING:
    from vlft.data.conversation import Conversation, ImageFacts, ImageRef
    from vlft.data.encode import EncodedSample, Outline

Encode = Callable[["Conversation"], "EncodedSample"]
Item = tuple["Conversation", "Outline"]
Inspected = dict[Path, "ImageFacts | DataError"]

SAMPLED = re.compile(f"(.+(?:{'|'.join(map(re.escape, FORMATS))}))#(.*)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class DataOptions:
    """How data files are read; see the flags of the same names."""

    image_tag: str
    image_token_id: int
    image_root: Path | None = None
    need_response: bool = True
    on_bad_sample: str = "error"
    on_long: str = "error"
    max_length: int | None = None
    # The longest sample that the model takes, in tokens; None if there is no limit.
    model_length: int | None = None
    seed: int = 0


class Dataset(Sequence["EncodedSample"]):
    """Conversations that are encoded on access, because their tensors would need much memory.

    Args:
        items: checked conversations, each with its outline.
        encode: of the processor.
    """

    def __init__(self, items: Sequence[Item], encode: Encode) -> None:
        self.conversations = tuple(conversation for conversation, _ in items)
        self.outlines = tuple(outline for _, outline in items)
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
            items = zip(self.conversations[index], self.outlines[index], strict=True)
            return Dataset(tuple(items), self._encode)
        return self._encode(self.conversations[index])

    def split(self, ratio: float, seed: int) -> tuple[Dataset, Dataset]:
        """Training and validation part, drawn at random.

        Args:
            ratio: share of the validation part, which has at least one sample; 0 for none.
            seed: of the draw.
        """
        count = min(max(1, round(len(self) * ratio)), len(self) - 1) if ratio > 0 else 0
        chosen = set(random.Random(seed).sample(range(len(self)), count))
        parts: tuple[list[Item], list[Item]] = ([], [])
        for index, item in enumerate(zip(self.conversations, self.outlines, strict=True)):
            parts[index in chosen].append(item)
        return Dataset(parts[0], self._encode), Dataset(parts[1], self._encode)


def load_dataset(
    files: Sequence[str],
    encode: Encode,
    options: DataOptions,
    inspected: Inspected | None = None,
) -> Dataset:
    """Reads, checks and mixes data files.

    Args:
        files: paths, each with an optional ``#N`` that draws N of its records.
        encode: of the processor; called once per conversation, to know its length.
        options: see DataOptions.
        inspected: images that were checked before; those checked here are added.

    Raises:
        UsageError: every problem of every file and record, or that no sample is left.
    """
    items: list[Item] = []
    problems: list[UsageError] = []
    unusable: list[UsageError] = []
    inspected = {} if inspected is None else inspected
    for spec in files:
        try:
            found, wrong = _read_file(spec, encode, options, inspected)
        except UsageError as error:
            problems.append(error)
            unusable.append(error)
            continue
        items += found
        problems += wrong
    raise_all(problems if options.on_bad_sample == "error" else unusable)
    if problems:
        bad = "1 bad record" if len(problems) == 1 else f"{len(problems)} bad records, the first"
        warn(f"skipped {bad}: {problems[0]}")
    if not items:
        raise DataError(
            "no usable sample is left",
            place=", ".join(map(shown, files)),
            hint="correct the records; the warnings above name the first that was skipped",
        )
    return Dataset(items, encode)


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
    loaded = []
    for group in (files, val_files):
        try:
            data = load_dataset(group, encode, options, inspected) if group else Dataset((), encode)
            loaded.append(data)
        except CollectedError as error:
            problems += error.problems
        except UsageError as error:
            problems.append(error)
    raise_all(problems)
    train, val = loaded
    if val_files or len(train) < 2:
        return train, val
    return train.split(val_ratio, options.seed)


def _read_file(
    spec: str, encode: Encode, options: DataOptions, inspected: Inspected
) -> tuple[list[Item], list[UsageError]]:
    """The usable conversations of a file and the problems of the others, in its order."""
    path, count = _parse_spec(spec)
    records = list(read_records(path))
    if not records:
        raise DataError("no records", place=shown(path), hint="add some, or leave it out")
    if count is not None:
        if count > len(records):
            raise DataError(
                f"#{count} asks for more records than the file has",
                place=shown(spec),
                hint=f"allowed: #1 to #{len(records)}, or no number for all",
            )
        chosen = sorted(random.Random(options.seed).sample(range(len(records)), count))
        records = [records[index] for index in chosen]
    parsed = [_parse(record, options) for record in records]
    images = (image for item in parsed if not isinstance(item, UsageError) for image in item.images)
    inspected |= inspect_images(ref.path for ref in images if ref.path not in inspected)
    good: list[Item] = []
    problems: list[UsageError] = []
    too_long = 0
    for item in tracked(parsed, "checking samples", len(parsed)):
        try:
            fitted = _fit(_checked(item, inspected), encode, options)
        except UsageError as error:
            problems.append(error)
            continue
        if fitted is None:
            too_long += 1
        else:
            good.append(fitted)
    if too_long:
        samples = "1 sample" if too_long == 1 else f"{too_long} samples"
        warn(f"{shown(path)}: skipped {samples} of more than {options.max_length} tokens")
    return good, problems


def _parse_spec(spec: str) -> tuple[Path, int | None]:
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
        return native(
            record.fields,
            place=record.place,
            folder=options.image_root or record.path.parent,
            image_tag=options.image_tag,
            need_response=options.need_response,
        )
    except DataError as error:
        return error


def _checked(item: Conversation | UsageError, inspected: Inspected) -> Conversation:
    """The conversation with the facts about its images; raises the error of the record if any."""
    if isinstance(item, UsageError):
        raise item

    def with_facts(image: ImageRef) -> ImageRef:
        facts = inspected[image.path]
        if isinstance(facts, DataError):
            place = f"{item.place}: {shown(image.path)}"
            raise DataError(facts.message, place=place, hint=facts.hint)
        return replace(image, facts=facts)

    return item.map_images(with_facts)


def _fit(conversation: Conversation, encode: Encode, options: DataOptions) -> Item | None:
    """The conversation, cut to max_length if allowed, and its outline; None to skip it."""
    limit = options.max_length
    sample = encode(conversation)
    length = len(sample)
    if limit is None or length <= limit:
        return conversation, outline(sample, options.image_token_id)
    if options.on_long == "skip":
        return None
    if options.on_long == "truncate-history":
        shorter = conversation
        while len(shorter.turns) > 2:
            shorter = shorter.without_first_exchange()
            sample = encode(shorter)
            if len(sample) <= limit:
                return shorter, outline(sample, options.image_token_id)
    if options.model_length is None or length <= options.model_length:
        remedy = "raise --max-length, or use --on-long skip"
    else:
        remedy = (
            f"the model takes at most {options.model_length}; shorten it, or use --on-long skip"
        )
    hint = f"{remedy} or truncate-history"
    if options.on_long == "truncate-history":
        hint = f"it is too long even without its history; {remedy}"
    if not options.need_response:
        hint = "shorten it, or leave such records out with --on-bad-sample skip"
    raise DataError(
        f"{length} tokens, at most {limit} are allowed", place=conversation.place, hint=hint
    )
