"""Samples -> epochs -> optimiser steps -> rows. Depends on the seed and nothing else.

epoch   groups of samples that share pictures, shuffled
step    the next ``batch_size`` samples
row     as many of the step's samples as fit into ``tokens_per_row``, those that share together
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlft.packing.prefix_tree import PackedBatch, Path, common_prefix, pack, to_paths

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from vlft.data.encode import EncodedSample


# Unrelated samples share a row up to this many tokens: enough to fill the matrix products. Beyond,
# the mask's square costs more than a second row does.
JOINED_TOKENS = 1024


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


def pack_rows(
    samples: Sequence[EncodedSample],
    image_token_id: int,
    *,
    tokens_per_row: int,
    share: bool = True,
) -> list[PackedBatch]:
    """The samples of a step in as few rows as fit.

    Samples that share much of their prompt fill a row up to ``tokens_per_row``; unrelated ones
    are joined up to JOINED_TOKENS. A sample that is longer gets a row of its own.

    Args:
        samples: of one step.
        image_token_id: marks the tokens that are images.
        tokens_per_row: most tokens of a row, after sharing.
        share: whether equal prefixes are held once.
    """
    paths = to_paths(samples, image_token_id)
    bundles = _bundles(paths, tokens_per_row, share=share)
    bins: list[tuple[int, list[int]]] = []
    # First fit decreasing: the long ones first, each into the first row with room.
    for cost, members in sorted(bundles, key=lambda bundle: -bundle[0]):
        for place, (used, inside) in enumerate(bins):
            if used + cost <= min(tokens_per_row, JOINED_TOKENS):
                bins[place] = (used + cost, inside + members)
                break
        else:
            bins.append((cost, members))
    return [
        pack([samples[index] for index in sorted(members)], image_token_id, share=share)
        for _, members in bins
    ]


def _bundles(paths: list[Path], limit: int, *, share: bool) -> list[tuple[int, list[int]]]:
    """(tokens, sample indices) of what goes into one row together.

    In sorted order the samples that share most are neighbours. One joins the bundle before it
    where that saves at least half of its tokens; a prompt that all share is not reason enough.
    """
    if not share:
        return [(len(path.keys), [index]) for index, path in enumerate(paths)]
    order = sorted(range(len(paths)), key=lambda index: paths[index].keys)
    bundles: list[tuple[int, list[int]]] = []
    for place, index in enumerate(order):
        keys = paths[index].keys
        shared = common_prefix(paths[order[place - 1]].keys, keys) if place else 0
        new = len(keys) - shared
        if bundles and 2 * shared >= len(keys) and bundles[-1][0] + new <= limit:
            cost, members = bundles[-1]
            bundles[-1] = (cost + new, [*members, index])
        else:
            bundles.append((len(keys), [index]))
    return bundles
