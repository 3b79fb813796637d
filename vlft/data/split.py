"""Which records are drawn from the files of a run, and which of them validate it.

A position is (number of the file on the command line, number of the record in the file), both from
0. Draws are made over positions, whether or not their records turn out to be usable: a record that
is skipped later keeps its place, so that it moves no other one between the two sets.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vlft.console import info, warn
from vlft.data.options import History
from vlft.errors import CheckpointError, DataError, shown
from vlft.files import read_own, real_path
from vlft.schema import Schema, many, whole

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from vlft.data.dataset import Dataset

Position = tuple[int, int]

# In a run folder: the positions of the validation records that were split off.
SPLIT_FILE = "split.json"
_SCHEMA: Schema = {"validation": many(many(whole(0, 2**40), 2, 2), 0, 2**32)}


@dataclass
class Draws:
    """Draws ``FILE#N`` of one command, each among the records that no earlier one has taken.

    Attributes:
        seed: of the draws.
        independent: whether each draw starts anew, as runs of older releases did.
        taken: by file, the records taken so far.
    """

    seed: int
    independent: bool = False
    taken: dict[Path, Collection[int]] = field(default_factory=dict)

    def take(self, path: Path, records: int, amount: str | None, spec: str) -> Sequence[int]:
        """The records of a file that are read, in its order.

        Args:
            path: the file.
            records: how many it has.
            amount: how many to draw, or a share of all like ``20%``; None takes all, also those
                taken before.
            spec: as written, for messages.

        Raises:
            DataError: none is left.
        """
        taken = self.taken.get(real_path(path), ())
        if amount is None:
            if taken and not self.independent:
                warn(f"{shown(spec)}: {len(taken)} of its records are taken already, and once more")
            self.taken[real_path(path)] = range(records)
            return range(records)
        taken = self.taken[real_path(path)] = set(taken)
        free = [i for i in range(records) if self.independent or i not in taken]
        before = f" ({len(taken)} are taken already)" if len(free) < records else ""
        if not free:
            found = f"no record is left{before}"
            hint = "name another file, or draw fewer of this one before"
            raise DataError(found, place=shown(spec), hint=hint)
        count = int(amount) if amount.isdecimal() else _share(amount, records)
        if count > len(free):
            warn(f"{shown(spec)}: takes all of its {len(free)} records{before}")
        chosen = sorted(random.Random(self.seed).sample(free, min(count, len(free))))
        taken.update(chosen)
        return chosen


def _share(amount: str, records: int) -> int:
    return max(1, round(records * float(amount.removesuffix("%")) / 100))


def with_weight(data: Dataset) -> Dataset:
    """The samples without those of weight 0; says how many these are.

    Raises:
        DataError: none is left.
    """
    without = np.flatnonzero(data.store.weights[data.rows] == 0).tolist()
    idle = len(without)
    if not idle:
        return data
    if idle == len(data):
        raise nothing_has_weight(idle)
    found = "1 sample has" if idle == 1 else f"{idle} samples have"
    info(f"{found} weight 0 and {'is' if idle == 1 else 'are'} left out of training and validation")
    return data.divide(without)[0]


def nothing_has_weight(count: int) -> DataError:
    """The error of data whose samples all have weight 0."""
    found = "1 sample has" if count == 1 else f"{count} samples have"
    return DataError(f"{found} weight 0, and there is no other", hint="raise some weights")


def split_off(data: Dataset, ratio: float, seed: int) -> list[int]:
    """Indices of the samples that validate; samples on one image, or equal ones, stay together.

    Args:
        data: the samples.
        ratio: share of the records, skipped ones too, that validates.
        seed: of the draw.

    Returns:
        At least one. If every group is too large, single samples, whose images are trained on too.
    """
    drawn = np.concatenate(
        [(n << 32) + np.asarray(part, np.int64) for n, part in data.drawn.items()]
    )
    wanted = min(max(1, round(len(drawn) * ratio)), len(data) - 1)
    groups = _groups(data)
    sizes = np.bincount(groups)
    by_group, ends = np.argsort(groups, kind="stable"), np.cumsum(sizes)
    positions = data.store.positions[data.rows]
    # A record may give several samples. They are in one group, so any of them stands for it.
    found = np.searchsorted(positions, drawn, side="right") - 1
    is_sample = (found >= 0) & (positions[found] == drawn)
    chosen: set[int] = set()
    skipped = 0
    for number in random.Random(seed).sample(range(len(drawn)), len(drawn)):
        if len(chosen) + skipped >= wanted:
            break
        group = groups[found[number]]
        if not is_sample[number]:
            skipped += 1
        # A large group would leave little to train on.
        elif len(chosen) + skipped + sizes[group] <= 1.5 * wanted:
            chosen.update(by_group[ends[group] - sizes[group] : ends[group]].tolist())
    least = int(np.argmin(sizes))
    smallest = by_group[ends[least] - sizes[least] : ends[least]]
    if not chosen and 2 * len(smallest) <= len(data):
        chosen.update(smallest.tolist())
    return sorted(chosen or random.Random(seed).sample(range(len(data)), wanted))


def _groups(data: Dataset) -> Any:
    """(S,) numbers of the groups of samples connected by images, equal, or of one record.

    An image in more than half of the samples, like a reference or a blank one, connects nothing.
    """
    owners, images = data.shown_images()
    known: dict[str, int] = {}
    digests = map(data.store.digest, range(len(data.store.paths)))
    by_content = np.array([known.setdefault(digest, len(known)) for digest in digests], int)
    pairs = np.unique(np.stack([by_content[images], owners]), axis=1)
    is_rare = 2 * np.bincount(pairs[0])[pairs[0]] <= len(data)
    every = np.arange(len(data))
    edges = [_neighbours(*pairs[:, is_rare])]
    edges += [
        _neighbours(values, every) for values in (data.identities, data.store.positions[data.rows])
    ]
    parent = list(range(len(data)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for one, other in zip(*np.concatenate(edges, axis=1).tolist(), strict=True):
        first, second = root(one), root(other)
        parent[max(first, second)] = min(first, second)
    # A root is the first sample of its group, so the groups are in the order of their first ones.
    return np.unique([root(index) for index in range(len(data))], return_inverse=True)[1]


def _neighbours(keys: Any, samples: Any) -> Any:
    """(2, E) samples that follow each other among those of one key."""
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    return np.stack([samples[order[same]], samples[order[same + 1]]])


def write_split(run: Path, positions: Sequence[Position]) -> None:
    """Writes the positions of the validation records into a run folder."""
    (run / SPLIT_FILE).write_text(json.dumps({"validation": list(positions)}) + "\n", "utf-8")


def read_history(run: Path) -> History:
    """What a run has decided about its records.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not (run / SPLIT_FILE).is_file():
        return History(older_release=True)
    found = read_own(run / SPLIT_FILE, _SCHEMA)
    if "validation" not in found:
        hint = "copy it from a backup, or start a new run"
        raise CheckpointError("has no validation", place=shown(run / SPLIT_FILE), hint=hint)
    return History(tuple((number, record) for number, record in found["validation"]))
