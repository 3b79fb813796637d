"""Samples of a step -> rows. What is planned is what is packed.

Planning needs no tensors: it works on outlines (see data.encode), which are kept for every sample
of a run, so that the loop, the autotuner and ``vlft plan`` encode no sample to know its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlft.data.outline import outline
from vlft.packing.prefix_tree import common_prefix, pack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlft.data.encode import EncodedSample
    from vlft.data.outline import Outline
    from vlft.packing.batch import PackedBatch


@dataclass(frozen=True)
class RowPlan:
    """Which samples make a row.

    Attributes:
        tokens: length of the row, shared prefixes counted once.
        members: indices of its samples.
        targets: trained tokens, each as often as samples train it: the weight of the row's loss.
        sample_tokens: length of all its samples, before sharing.
        codes: how many of the targets are codes of drawn images.
        unprompted: those of the members that draw without their prompt.
    """

    tokens: int
    members: tuple[int, ...]
    targets: int = 0
    sample_tokens: int = 0
    codes: int = 0
    unprompted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Packer:
    """Packs the samples of a step into as few rows as fit.

    Samples that share much of their prompt fill a row up to ``tokens_per_row``; unrelated ones are
    joined up to ``joined_tokens``. A sample longer than that gets a row of its own. Of all limits
    that need no more rows the tightest is taken, which makes the rows even.

    Attributes:
        image_token_id: marks the tokens that are images.
        tokens_per_row: limit of a row in tokens, after sharing.
        joined_tokens: limit of a row whose samples share little.
        share_prefix: whether equal prefixes are stored once.
        world_size: the number of rows is rounded up to a multiple of it, if there are enough
            samples, so that every rank has work.
    """

    image_token_id: int
    tokens_per_row: int
    joined_tokens: int
    share_prefix: bool = True
    world_size: int = 1

    def plan(self, outlines: Sequence[Outline]) -> list[RowPlan]:
        """The rows of a step, the longest first; their members are indices into the outlines."""
        leaves = _sorted_leaves(outlines, share=self.share_prefix)
        rows = _fill(leaves, self.tokens_per_row, self.joined_tokens)
        most = -(-len(rows) // self.world_size) * self.world_size
        low, high = 1, self.tokens_per_row
        while low < high:
            limit = (low + high) // 2
            found = _fill(leaves, limit, self.joined_tokens)
            if len(found) <= most:
                rows, high = found, limit
            else:
                low = limit + 1
        exact = [
            RowPlan(
                _tree_tokens(leaves, row.members),
                row.members,
                sum(outlines[index].targets for index in row.members),
                sum(outlines[index].tokens for index in row.members),
                sum(image.codes for index in row.members for image in outlines[index].images),
            )
            for row in rows
        ]
        return sorted(exact, key=lambda row: (-row.tokens, row.members))

    def row(self, samples: Sequence[EncodedSample]) -> PackedBatch:
        """One row of all these samples, whatever its length."""
        return pack(samples, self.image_token_id, share=self.share_prefix)

    def rows(self, samples: Sequence[EncodedSample]) -> list[PackedBatch]:
        """The samples of a step as rows, the longest first."""
        plans = self.plan([outline(sample, self.image_token_id) for sample in samples])
        return [self.row([samples[index] for index in plan.members]) for plan in plans]


@dataclass(frozen=True)
class _Leaf:
    """A sample among its neighbours in sorted order.

    Attributes:
        index: of the sample in the step.
        tokens: length of the sample.
        shared: tokens of the longest common prefix with the sample before it.
    """

    index: int
    tokens: int
    shared: int


def _sorted_leaves(outlines: Sequence[Outline], *, share: bool) -> list[_Leaf]:
    """The samples in lexicographic order, so that those that share most are neighbours."""
    if not share:
        return [_Leaf(index, outline.tokens, 0) for index, outline in enumerate(outlines)]
    numbers: dict[str, int] = {}
    keys = [_keys(outline, numbers) for outline in outlines]
    before: tuple[int, ...] = ()
    leaves = []
    for index in sorted(range(len(keys)), key=keys.__getitem__):
        elements = common_prefix(before, keys[index])
        leaves.append(_Leaf(index, outlines[index].tokens, outlines[index].prefix_tokens(elements)))
        before = keys[index]
    return leaves


def _keys(outline: Outline, numbers: dict[str, int]) -> tuple[int, ...]:
    """The ids of an outline with equal negative numbers for equal images of the step.

    Args:
        outline: of a sample.
        numbers: of the images by content key; new ones are added.
    """
    keys: list[int] = outline.ids.tolist()
    for place, image in zip(outline.places, outline.images, strict=True):
        keys[place] = -1 - numbers.setdefault(image.key, len(numbers))
    return tuple(keys)


def _tree_tokens(leaves: Sequence[_Leaf], members: Sequence[int]) -> int:
    """Tokens of the prefix tree of some samples.

    Two samples share the least that any neighbours between them share.
    """
    inside = set(members)
    tokens, shared = 0, 0
    for leaf in leaves:
        shared = min(shared, leaf.shared)
        if leaf.index in inside:
            tokens += leaf.tokens - shared
            shared = leaf.tokens
    return tokens


def _fill(leaves: Sequence[_Leaf], limit: int, joined: int) -> list[RowPlan]:
    """Rows of at most ``limit`` tokens, unless a single sample has more.

    First fit decreasing over bundles; a prompt shared between bundles of one row is not counted,
    so the real row is shorter.
    """
    rows: list[RowPlan] = []
    for bundle in sorted(_bundles(leaves, limit), key=lambda bundle: -bundle.tokens):
        for place, row in enumerate(rows):
            if row.tokens + bundle.tokens <= min(limit, joined):
                members = tuple(sorted(row.members + bundle.members))
                rows[place] = RowPlan(row.tokens + bundle.tokens, members)
                break
        else:
            rows.append(bundle)
    return rows


def _bundles(leaves: Sequence[_Leaf], limit: int) -> list[RowPlan]:
    """Samples that belong into one row because they share.

    A sample joins the bundle before it if that saves at least half of its tokens: a system prompt
    that all samples share is not reason enough.
    """
    bundles: list[RowPlan] = []
    for leaf in leaves:
        new = leaf.tokens - leaf.shared
        if bundles and 2 * leaf.shared >= leaf.tokens and bundles[-1].tokens + new <= limit:
            last = bundles[-1]
            bundles[-1] = RowPlan(last.tokens + new, tuple(sorted((*last.members, leaf.index))))
        else:
            bundles.append(RowPlan(leaf.tokens, (leaf.index,)))
    return bundles
