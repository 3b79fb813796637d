"""A packed row: tokens, targets, images. How it is made stands in packing.prefix_tree."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlft.packing.window import Window

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlft.data.encode import EncodedImage
    from vlft.models.tree_attention import Block


def _with_each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a row, or of its codes, with every tensor changed."""
    changed: dict[str, Any] = {}
    for field in fields(value):
        found = getattr(value, field.name)
        if isinstance(found, Tensor):
            changed[field.name] = change(found)
        elif isinstance(found, PackedCodes):
            changed[field.name] = _with_each(found, change)
    return replace(value, **changed)


@dataclass(frozen=True)
class PackedCodes:
    """The drawn images of a row.

    Legend: C targets, P code tokens of the row. The codes of all distinct drawn images, which are
    not known here, stand end to end; the last of an image is a target alone.

    Attributes:
        source: (C,) int64, index of the token after which a code is predicted.
        target: (C,) int64, index of that code.
        weight: (C,) float32, how many samples train it there.
        positions: (P,) int64, index of each code token in the row.
        inputs: (P,) int64, index of its code.
        images: the drawn images, in the order of their codes.
    """

    source: Tensor
    target: Tensor
    weight: Tensor
    positions: Tensor
    inputs: Tensor
    images: tuple[EncodedImage, ...]


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
        images: I distinct images that are seen, in the order of their features.
        codes: of the images that are drawn.
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
    codes: PackedCodes
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
        found: PackedBatch = _with_each(self, lambda one: one.to(device, non_blocking=True))
        return found

    def pinned(self) -> PackedBatch:
        """A copy with its tensors in pinned memory."""
        found: PackedBatch = _with_each(self, Tensor.pin_memory)
        return found

    def without_targets(self) -> PackedBatch:
        """The row with zero for the weight of each target."""
        codes = replace(self.codes, weight=torch.zeros_like(self.codes.weight))
        return replace(self, weight=torch.zeros_like(self.weight), codes=codes)
