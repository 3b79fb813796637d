"""Which records are drawn from the files of a run, and which of them validate it.

A position is (number of the file on the command line, number of the record in the file), both from
0. Draws are made over positions, whether or not their records turn out to be usable: a record that
is skipped later keeps its place, so that it moves no other one between the two sets.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlft.console import warn
from vlft.data.options import History
from vlft.errors import DataError, shown
from vlft.files import read_object, real_path
from vlft.schema import Schema, many, whole

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence
    from pathlib import Path

    from vlft.data.encode import Outline

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
    taken: dict[Path, set[int]] = field(default_factory=dict)

    def take(self, path: Path, records: int, amount: str | None, spec: str) -> list[int]:
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
        taken = self.taken.setdefault(real_path(path), set())
        if amount is None:
            if taken and not self.independent:
                warn(f"{shown(spec)}: {len(taken)} of its records are taken already, and once more")
            taken.update(range(records))
            return list(range(records))
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


def split_off(
    positions: Sequence[Position],
    outlines: Sequence[Outline],
    drawn: Sequence[Position],
    ratio: float,
    seed: int,
) -> set[int]:
    """Indices of the samples that validate; samples on one image, or equal ones, stay together.

    Args:
        positions: of the usable samples.
        outlines: of the usable samples.
        drawn: positions of all records, skipped ones too.
        ratio: share of the records that validates.
        seed: of the draw.

    Returns:
        At least one. If every group is too large, single samples, whose images are trained on too.
    """
    wanted = min(max(1, round(len(drawn) * ratio)), len(positions) - 1)
    groups = _groups(outlines, positions)
    group_of = {index: group for group in groups for index in group}
    index_of = {position: index for index, position in enumerate(positions)}
    chosen: set[int] = set()
    skipped = 0
    for position in random.Random(seed).sample(list(drawn), len(drawn)):
        found = index_of.get(position)
        if len(chosen) + skipped >= wanted:
            break
        if found is None:
            skipped += 1
        # A large group would leave little to train on.
        elif len(chosen) + skipped + len(group_of[found]) <= 1.5 * wanted:
            chosen.update(group_of[found])
    smallest = min(groups, key=len)
    if not chosen and 2 * len(smallest) <= len(positions):
        chosen.update(smallest)
    return chosen or set(random.Random(seed).sample(range(len(positions)), wanted))


def _groups(outlines: Sequence[Outline], positions: Sequence[Position]) -> list[list[int]]:
    """Indices of the samples that are connected by images, equal, or of one record.

    An image in more than half of the samples, like a reference or a blank one, connects nothing.
    """
    shown_by = Counter(
        key for outline in outlines for key in {image.digest for image in outline.images}
    )
    parent = list(range(len(outlines)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[Hashable, int] = {}
    for index, (outline, position) in enumerate(zip(outlines, positions, strict=True)):
        keys: set[Hashable] = {
            image.digest for image in outline.images if 2 * shown_by[image.digest] <= len(outlines)
        }
        for key in (*keys, identity(outline), position):
            parent[root(index)] = root(first.setdefault(key, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(outlines)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def identity(outline: Outline) -> Hashable:
    """Equal for samples with the same text and the same images."""
    return outline.ids.tobytes(), tuple(image.key for image in outline.images)


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
    found = read_object(run / SPLIT_FILE, _SCHEMA).get("validation", [])
    return History(tuple((number, record) for number, record in found))
