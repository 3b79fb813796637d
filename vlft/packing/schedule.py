"""Samples -> epochs -> optimiser steps -> rows. Depends on the seed and nothing else.

epoch   groups of samples that share pictures, shuffled
step    the next ``batch_size`` samples
row     as many of the step's samples as fit into ``tokens_per_row``, those that share together
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlft.config import JOINED_TOKENS
from vlft.packing.prefix_tree import PackedBatch, Path, common_prefix, pack, to_paths

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from vlft.data.encode import EncodedSample


# Where attention costs a token as much as all linear layers: about six times the LLM's width.
EVEN_TOKENS = 12_000


@dataclass(frozen=True)
class Schedule:
    """The order of the samples of a run.

    Attributes:
        groups: one key per sample; samples with equal keys stay together. One key each to shuffle
            freely.
        batch_size: samples per optimiser step.
        seed: of the shuffling.
    """

    groups: tuple[Hashable, ...]
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch; the last may have fewer samples."""
        return -(-len(self.groups) // self.batch_size)

    def epoch(self, number: int) -> list[list[int]]:
        """The sample indices of every step of an epoch (0-based)."""
        members: dict[Hashable, list[int]] = {}
        for index, key in enumerate(self.groups):
            members.setdefault(key, []).append(index)
        groups = list(members.values())
        random.Random(f"{self.seed}/{number}").shuffle(groups)
        order = [index for group in groups for index in group]
        return [
            order[start : start + self.batch_size]
            for start in range(0, len(order), self.batch_size)
        ]

    def steps(self, first: int = 0) -> Iterator[tuple[int, list[int]]]:
        """(step number, sample indices) without end, from the given 0-based step on."""
        step = first
        while True:
            number, offset = divmod(step, self.steps_per_epoch)
            for indices in self.epoch(number)[offset:]:
                yield step, indices
                step += 1


@dataclass(frozen=True)
class RowPlan:
    """What goes into a row.

    Attributes:
        tokens: of the row.
        members: indices of its samples.
    """

    tokens: int
    members: tuple[int, ...]


def pack_rows(
    samples: Sequence[EncodedSample],
    image_token_id: int,
    *,
    tokens_per_row: int,
    share: bool = True,
    processes: int = 1,
    joined_tokens: int = JOINED_TOKENS["cpu"],
) -> list[PackedBatch]:
    """The samples of a step in as few rows as fit, the longest first; see plan_rows.

    Args:
        samples: of one step.
        image_token_id: marks the tokens that are images.
        tokens_per_row: most tokens of a row, after sharing.
        share: whether equal prefixes are held once.
        processes: that divide the rows among them.
        joined_tokens: most tokens of a row of samples that share little.
    """
    plans = plan_rows(
        to_paths(samples, image_token_id),
        tokens_per_row,
        share=share,
        processes=processes,
        joined_tokens=joined_tokens,
    )
    return [
        pack([samples[index] for index in plan.members], image_token_id, share=share)
        for plan in plans
    ]


def plan_rows(
    paths: Sequence[Path],
    tokens_per_row: int,
    *,
    share: bool = True,
    processes: int = 1,
    joined_tokens: int = JOINED_TOKENS["cpu"],
) -> list[RowPlan]:
    """Which samples share a row; the longest row first.

    Samples that share much of their prompt fill a row up to ``tokens_per_row``; unrelated ones
    are joined up to ``joined_tokens``. A sample that is longer gets a row of its own. Of all limits
    that need no more rows the tightest is taken, which makes the rows even.

    Args:
        paths: of one step.
        tokens_per_row: most tokens of a row, after sharing.
        share: whether equal prefixes are held once.
        processes: the number of rows is rounded up to a multiple of it, where there is enough.
        joined_tokens: most tokens of a row of samples that share little.
    """
    order = _by_prefix(paths, share=share)
    rows = _fill(order, tokens_per_row, joined_tokens)
    most = -(-len(rows) // processes) * processes
    low, high = 1, tokens_per_row
    while low < high:
        limit = (low + high) // 2
        found = _fill(order, limit, joined_tokens)
        if len(found) <= most:
            rows, high = found, limit
        else:
            low = limit + 1
    exact = [RowPlan(_distinct(order, row.members), row.members) for row in rows]
    return sorted(exact, key=lambda row: (-row.tokens, row.members))


def divide(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Which rows each process runs: sums as even as the longest-first rule makes them.

    No process has more rows than ``ceil(rows / processes)``, so that all wait for one another as
    rarely as possible.

    Args:
        costs: of the rows.
        processes: how many.
    """
    most = -(-len(costs) // processes)
    shares: list[list[int]] = [[] for _ in range(processes)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        open_shares = [share for share in shares if len(share) < most]
        min(open_shares, key=lambda share: sum(costs[i] for i in share)).append(index)
    return shares


def row_cost(tokens: int) -> float:
    """What a row costs, in tokens of a short row: linear layers, and attention's square."""
    return tokens + tokens * tokens / EVEN_TOKENS


@dataclass(frozen=True)
class _Leaf:
    """A sample among its neighbours in sorted order: its tokens, those shared with the one before.

    Attributes:
        index: of the sample.
        tokens: of the sample.
        shared: tokens of the longest common prefix with the sample before.
    """

    index: int
    tokens: int
    shared: int


def _by_prefix(paths: Sequence[Path], *, share: bool) -> list[_Leaf]:
    """The samples sorted so that those that share most are neighbours."""
    if not share:
        return [_Leaf(index, len(path.keys), 0) for index, path in enumerate(paths)]
    order = sorted(range(len(paths)), key=lambda index: paths[index].keys)
    before: tuple[int, ...] = ()
    leaves = []
    for index in order:
        keys = paths[index].keys
        leaves.append(_Leaf(index, len(keys), common_prefix(before, keys)))
        before = keys
    return leaves


def _distinct(order: Sequence[_Leaf], members: Sequence[int]) -> int:
    """Tokens of a row: joined samples share their prompt too, which filling does not count.

    What two samples share is the least that neighbours between them share.
    """
    inside = set(members)
    tokens, shared = 0, 0
    for leaf in order:
        shared = min(shared, leaf.shared)
        if leaf.index in inside:
            tokens += leaf.tokens - shared
            shared = leaf.tokens
    return tokens


def _fill(order: Sequence[_Leaf], limit: int, joined: int) -> list[RowPlan]:
    """Rows of at most so many tokens, unless a sample alone has more.

    First fit decreasing: the long bundles first, each into the first row with room.
    """
    rows: list[RowPlan] = []
    for bundle in sorted(_bundles(order, limit), key=lambda bundle: -bundle.tokens):
        for place, row in enumerate(rows):
            if row.tokens + bundle.tokens <= min(limit, joined):
                members = tuple(sorted(row.members + bundle.members))
                rows[place] = RowPlan(row.tokens + bundle.tokens, members)
                break
        else:
            rows.append(bundle)
    return rows


def _bundles(order: Sequence[_Leaf], limit: int) -> list[RowPlan]:
    """Samples that go into one row because they share.

    One joins the bundle before it where that saves at least half of its tokens; a prompt that all
    share is not reason enough.
    """
    bundles: list[RowPlan] = []
    for leaf in order:
        new = leaf.tokens - leaf.shared
        if bundles and 2 * leaf.shared >= leaf.tokens and bundles[-1].tokens + new <= limit:
            last = bundles[-1]
            bundles[-1] = RowPlan(last.tokens + new, tuple(sorted((*last.members, leaf.index))))
        else:
            bundles.append(RowPlan(leaf.tokens, (leaf.index,)))
    return bundles
