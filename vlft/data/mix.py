"""``--mix``: the sources of a run's training data and the share of an epoch that each has.

A source is what one ``--dataset`` names, be it a pattern that several files match. ``0.7x3`` in the
saved settings of a run is the share of three files together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlft.data.specs import expand_each
from vlft.errors import ConfigError, shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FLAG = "--mix"


@dataclass(frozen=True)
class Source:
    """A part of the training data.

    Attributes:
        files: as written, in order.
        first: number of the first of them among all files of the command.
        share: of an epoch, relative to the other sources'; None where every record counts alike.
    """

    files: tuple[str, ...]
    first: int
    share: float | None

    @property
    def name(self) -> str:
        """For tables and messages."""
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return shown(self.files[0]) + more


def sources_of(files: Sequence[str | Mapping[str, Any]], mix: str | None) -> list[Source]:
    """The sources of the training data.

    Args:
        files: as written after ``--dataset``.
        mix: as written after ``--mix``; None if it is not given.

    Raises:
        ConfigError: the numbers do not fit the sources.
        DataError: a pattern matches no file.
    """
    groups = expand_each(files)
    shares = [(None, None)] * len(groups) if mix is None else _parse(mix)
    hint = f"write a number for each of {', '.join(shown(group[0]) for group in groups)}"
    if mix is not None and len(groups) == 1:
        hint = "name another source with --dataset, or leave it out"
        raise ConfigError("there is 1 source; nothing is mixed", place=FLAG, hint=hint)
    made: list[Source] = []
    rest = list(groups)
    for share, count in shares:
        taken = rest[:1] if count is None else _joined(rest, count)
        if not taken:
            break
        names = tuple(name for group in taken for name in group)
        made.append(Source(names, sum(len(source.files) for source in made), share))
        del rest[: len(taken)]
    if rest or len(made) < len(shares):
        found = f"found {_count(len(shares), 'number')} for {_count(len(groups), 'source')}"
        raise ConfigError(found, place=f"{FLAG} {mix}", hint=hint)
    return made


def resolved_mix(files: Sequence[str | Mapping[str, Any]], mix: str | None) -> str | None:
    """``--mix`` for the files that the patterns of ``--dataset`` match.

    Raises:
        ConfigError: as ``sources_of``.
    """
    if mix is None:
        return None
    sources = sources_of(files, mix)
    return ",".join(
        f"{source.share:g}" + (f"x{len(source.files)}" if len(source.files) > 1 else "")
        for source in sources
    )


def _joined(groups: Sequence[Sequence[str]], count: int) -> Sequence[Sequence[str]]:
    """The first groups, which have this many files together; none if no number of them has."""
    for number in range(1, len(groups) + 1):
        if sum(map(len, groups[:number])) == count:
            return groups[:number]
    return []


def _parse(mix: str) -> list[tuple[float | None, int | None]]:
    """Share, and number of files if it is stated."""
    made: list[tuple[float | None, int | None]] = []
    for part in mix.split(","):
        text, mark, count = part.strip().partition("x")
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not 0 < share < math.inf or (mark and not (count.isdecimal() and 0 < int(count) < 1e6)):
            raise ConfigError(
                f"found {part.strip()!r:.50}, numbers above 0 are allowed",
                place=FLAG,
                hint="write one for each --dataset in order, e.g. 0.7,0.3; leave out a source that "
                "is not to be trained",
            )
        made.append((share, int(count) if mark else None))
    return made


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
