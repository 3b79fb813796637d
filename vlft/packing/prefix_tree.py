"""Samples -> one row that stores every distinct prefix once.

Three samples "s a b", "s a c", "s d" (one letter a token) become a tree and its depth-first row:

    s ─┬─ a ─┬─ b          index   0  1  2  3  4
       │     └─ c          token   s  a  b  c  d
       └─ d                depth   0  1  2  2  1     position_ids
                           exit    5  4  3  4  5     one past the last descendant

Token j may attend to token i iff i <= j < exit[i], that is if i is j or one of its ancestors.
Samples without a common first token are separate trees, which the same rule keeps apart. Where
replies have a window, see packing.window, a token of a reply is never shared with a prompt. Each
sample has the context and the positions that it would have alone, hence the same losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlft.data.encode import IGNORE, REPLY, EncodedImage, EncodedSample
from vlft.packing.attention import find_segments
from vlft.packing.batch import PackedBatch, PackedCodes
from vlft.packing.window import UNBOUNDED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class TokenPath:
    """A sample as a path of the tree.

    Attributes:
        keys: one integer per token; samples share a prefix of their paths if its keys are equal. A
            text token's key is its id, an image token's is negative and stands for image and place.
            Where replies have a window, REPLY is added to the keys of theirs.
        tokens: ids.
        labels: as in EncodedSample.
        window: as in EncodedSample.
        prompt: number of tokens before the reply.
        codes: indices of the codes that follow its last tokens, one after each.
    """

    keys: tuple[int, ...]
    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    window: int | None
    prompt: int
    codes: range = range(0)

    def reach(self, depth: int) -> int:
        """Of the token at a depth, see packing.window."""
        in_prompt = self.window is None or depth < self.prompt
        return UNBOUNDED if in_prompt else depth + (self.window or 0)


def pack(
    samples: Sequence[EncodedSample], image_token_id: int, *, share: bool = True
) -> PackedBatch:
    """The row of some samples.

    Args:
        samples: at least one.
        image_token_id: marks the tokens that are images.
        share: whether equal prefixes are stored once; if not, every sample is a tree of its own.
    """
    return pack_with_paths(samples, image_token_id, share=share)[0]


def pack_with_paths(
    samples: Sequence[EncodedSample], image_token_id: int, *, share: bool = True
) -> tuple[PackedBatch, list[list[int]]]:
    """The row that ``pack`` makes, and the indices in it of each sample's tokens."""
    images = _distinct_images(samples)
    rows = _Rows(images)
    paths = _token_paths(samples, rows, image_token_id)
    order = list(range(len(paths)))
    if share:
        order.sort(key=lambda index: paths[index].keys)
    row = _Row()
    places: dict[int, list[int]] = {}
    for index in order:
        row.add(paths[index], share=share)
        places[index] = list(row.open)
    return row.finish(tuple(images.values()), rows.seen), [places[i] for i in range(len(paths))]


class _Rows:
    """Where the tokens of distinct images stand: features of those seen, then codes of those drawn.

    Args:
        images: by key.

    Attributes:
        first: key -> the first.
        seen: number of those of images that are seen.
    """

    def __init__(self, images: Mapping[str, EncodedImage]) -> None:
        order = sorted(images, key=lambda key: images[key].drawn)
        counts = [images[key].codes or images[key].tokens for key in order]
        self.first = dict(zip(order, accumulate(counts, initial=0), strict=False))
        self.seen = sum(image.tokens for image in images.values() if not image.drawn)


def _token_paths(
    samples: Sequence[EncodedSample], rows: _Rows, image_token_id: int
) -> list[TokenPath]:
    """The samples as paths, in order.

    The key of an image token is -1 minus its place among the tokens of all images, see _Rows.
    """
    paths = []
    for sample in samples:
        tokens = tuple(sample.input_ids.tolist())
        image_keys = iter(
            -1 - rows.first[image.key] - place
            for image in sample.images
            for place in range(image.tokens)
        )
        keys = [next(image_keys) if token == image_token_id else token for token in tokens]
        prompt = sample.prompt_tokens
        if sample.window is not None:
            keys[prompt:] = [key + REPLY for key in keys[prompt:]]
        codes = range(0)
        if sample.drawn:
            first = rows.first[sample.drawn.key] - rows.seen
            codes = range(first, first + sample.drawn.codes)
        labels = tuple(sample.labels.tolist())
        paths.append(TokenPath(tuple(keys), tokens, labels, sample.window, prompt, codes))
    return paths


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    limit = min(len(left), len(right))
    for index in range(limit):
        if left[index] != right[index]:
            return index
    return limit


class _Row:
    """A row while it grows in depth-first order. ``open`` is the path to the newest token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.keys: list[int] = []
        self.depths: list[int] = []
        self.exits: list[int] = []
        self.reaches: list[int] = []
        self.targets: dict[tuple[int, int], float] = {}
        self.codes: dict[tuple[int, int], float] = {}
        self.open: list[int] = []
        self.samples = 0
        self.sample_tokens = 0

    def add(self, path: TokenPath, *, share: bool) -> None:
        shared = common_prefix([self.keys[i] for i in self.open], path.keys) if share else 0
        self._close(shared)
        for depth in range(shared, len(path.keys)):
            self.open.append(len(self.tokens))
            self.tokens.append(path.tokens[depth])
            self.keys.append(path.keys[depth])
            self.depths.append(depth)
            self.exits.append(-1)
            self.reaches.append(path.reach(depth))
        for depth in range(1, len(path.keys)):
            if path.labels[depth] != IGNORE:
                target = (self.open[depth - 1], path.labels[depth])
                self.targets[target] = self.targets.get(target, 0.0) + 1.0
        sources = self.open[len(self.open) - len(path.codes) :]
        for target in zip(sources, path.codes, strict=True):
            self.codes[target] = self.codes.get(target, 0.0) + 1.0
        self.samples += 1
        self.sample_tokens += len(path.keys)

    def finish(self, images: tuple[EncodedImage, ...], seen: int) -> PackedBatch:
        """The row; ``seen`` is the number of tokens of the images that are seen."""
        self._close(0)
        keys = torch.tensor(self.keys)
        reach = torch.tensor(self.reaches)
        is_code, is_image = keys < -seen, keys < 0
        image_positions = (is_image & ~is_code).nonzero().squeeze(1)
        code_positions = is_code.nonzero().squeeze(1)
        source, target, weight = _triples(self.targets)
        codes = PackedCodes(
            *_triples(self.codes),
            positions=code_positions,
            inputs=-1 - keys[code_positions] - seen,
            images=tuple(image for image in images if image.drawn),
        )
        return PackedBatch(
            input_ids=torch.tensor(self.tokens).unsqueeze(0),
            position_ids=torch.tensor(self.depths).unsqueeze(0),
            exit=torch.tensor(self.exits),
            segments=find_segments(self.exits),
            source=source,
            target=target,
            weight=weight,
            image_positions=image_positions,
            feature_rows=-1 - keys[image_positions],
            images=tuple(image for image in images if not image.drawn),
            codes=codes,
            samples=self.samples,
            sample_tokens=self.sample_tokens,
            reach=reach if (reach < UNBOUNDED).any() else None,
        )

    def _close(self, depth: int) -> None:
        """Sets the exit of every open token from this depth on."""
        for index in self.open[depth:]:
            self.exits[index] = len(self.tokens)
        del self.open[depth:]


def _triples(targets: Mapping[tuple[int, int], float]) -> tuple[Tensor, Tensor, Tensor]:
    """Source, target and weight of each target, in order."""
    found = sorted(targets.items())
    return (
        torch.tensor([source for (source, _), _ in found], dtype=torch.int64),
        torch.tensor([target for (_, target), _ in found], dtype=torch.int64),
        torch.tensor([weight for _, weight in found], dtype=torch.float32),
    )


def _distinct_images(samples: Sequence[EncodedSample]) -> dict[str, EncodedImage]:
    """The distinct images by content, in the order of their first use."""
    found: dict[str, EncodedImage] = {}
    for sample in samples:
        for image in sample.images:
            found.setdefault(image.key, image)
    return found
