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

from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlft.data.encode import IGNORE, REPLY, EncodedImage, EncodedSample
from vlft.packing.attention import find_segments
from vlft.packing.window import UNBOUNDED, Window

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vlft.models.tree_attention import Block


@dataclass(frozen=True)
class PackedBatch:
    """One row of tokens for many samples.

    Legend: N tokens in the row, S targets, M image tokens, I distinct images.

    Attributes:
        input_ids: (1, N) int64.
        position_ids: (1, N) int64, depth of the token on its own path.
        exit: (N,) int64, index one past the last descendant.
        segments: its unbranched runs of tokens, in order.
        source: (S,) int64, index of the token whose successor is predicted.
        target: (S,) int64, id of that successor.
        weight: (S,) float32, how many samples train that successor there.
        image_positions: (M,) int64, index of each image token in the row.
        feature_rows: (M,) int64, its row in the concatenated features of all distinct images.
        images: I distinct images, in the order of their features.
        samples: number of samples in the row.
        sample_tokens: length of these samples before sharing.
        reach: (N,) int64, see packing.window; None if replies have no window.
    """

    input_ids: Tensor
    position_ids: Tensor
    exit: Tensor
    segments: tuple[Block, ...]
    source: Tensor
    target: Tensor
    weight: Tensor
    image_positions: Tensor
    feature_rows: Tensor
    images: tuple[EncodedImage, ...]
    samples: int
    sample_tokens: int
    reach: Tensor | None = None

    @property
    def window(self) -> Window | None:
        """What the attention of the replies is bounded by."""
        return None if self.reach is None else Window(self.position_ids[0], self.reach)

    def __len__(self) -> int:
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> PackedBatch:
        """A copy with its tensors on a device; from pinned memory without waiting."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> PackedBatch:
        """A copy with its tensors in pinned memory."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **changed)


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
    """

    keys: tuple[int, ...]
    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    window: int | None
    prompt: int

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
    images = _distinct_images(samples)
    paths = _token_paths(samples, images, image_token_id)
    if share:
        paths.sort(key=lambda path: path.keys)
    row = _Row()
    for path in paths:
        row.add(path, share=share)
    return row.finish(tuple(images.values()))


def _token_paths(
    samples: Sequence[EncodedSample], images: Mapping[str, EncodedImage], image_token_id: int
) -> list[TokenPath]:
    """The samples as paths, in order.

    The key of an image token is -1 minus its row in the concatenated features of all images.
    """
    first_rows = dict(
        zip(images, accumulate((i.tokens for i in images.values()), initial=0), strict=False)
    )
    paths = []
    for sample in samples:
        tokens = tuple(sample.input_ids.tolist())
        image_keys = iter(
            -1 - first_rows[image.key] - place
            for image in sample.images
            for place in range(image.tokens)
        )
        keys = [next(image_keys) if token == image_token_id else token for token in tokens]
        prompt = sample.prompt_tokens
        if sample.window is not None:
            keys[prompt:] = [key + REPLY for key in keys[prompt:]]
        labels = tuple(sample.labels.tolist())
        paths.append(TokenPath(tuple(keys), tokens, labels, sample.window, prompt))
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
        self.samples += 1
        self.sample_tokens += len(path.keys)

    def finish(self, images: tuple[EncodedImage, ...]) -> PackedBatch:
        self._close(0)
        keys = torch.tensor(self.keys)
        image_positions = (keys < 0).nonzero().squeeze(1)
        targets = sorted(self.targets.items())
        reach = torch.tensor(self.reaches)
        return PackedBatch(
            input_ids=torch.tensor(self.tokens).unsqueeze(0),
            position_ids=torch.tensor(self.depths).unsqueeze(0),
            exit=torch.tensor(self.exits),
            segments=find_segments(self.exits),
            source=torch.tensor([source for (source, _), _ in targets], dtype=torch.int64),
            target=torch.tensor([token for (_, token), _ in targets], dtype=torch.int64),
            weight=torch.tensor([weight for _, weight in targets], dtype=torch.float32),
            image_positions=image_positions,
            feature_rows=-1 - keys[image_positions],
            images=images,
            samples=self.samples,
            sample_tokens=self.sample_tokens,
            reach=reach if (reach < UNBOUNDED).any() else None,
        )

    def _close(self, depth: int) -> None:
        """Sets the exit of every open token from this depth on."""
        for index in self.open[depth:]:
            self.exits[index] = len(self.tokens)
        del self.open[depth:]


def _distinct_images(samples: Sequence[EncodedSample]) -> dict[str, EncodedImage]:
    """The distinct images by content, in the order of their first use."""
    found: dict[str, EncodedImage] = {}
    for sample in samples:
        for image in sample.images:
            found.setdefault(image.key, image)
    return found
