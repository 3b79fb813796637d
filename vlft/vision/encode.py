"""Images -> the features that take the place of their image tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from vlft.families.base import encode_images

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlft.data.encode import EncodedImage
    from vlft.families.base import Family, Tiles
    from vlft.families.processor import Processor

Stage = Literal["pixels", "vision", "aligned"]


@dataclass(frozen=True)
class RowImages:
    """The images of a row, as far as they have been encoded.

    Attributes:
        stage: pixels; vision: features of the towers; aligned: ready to replace image tokens.
        tensors: the model's inputs for pixels, else ``features``: (V, T, W) or (R, D).
        tiles: of each image; empty for text alone.
    """

    stage: Stage
    tensors: Mapping[str, Tensor]
    tiles: tuple[Tiles, ...]

    def to(self, device: torch.device) -> RowImages:
        """The same on a device."""
        return replace(self, tensors={k: t.to(device) for k, t in self.tensors.items()})


def pixels_of(images: Sequence[EncodedImage], processor: Processor) -> RowImages:
    """Distinct images, not encoded at all."""
    tiles = tuple(image.tiles for image in images)
    return RowImages("pixels", processor.image_inputs(images), tiles)


def place_features(
    model: nn.Module,
    family: Family,
    input_ids: Tensor,
    images: RowImages,
    image_positions: Tensor,
    feature_rows: Tensor,
) -> Tensor:
    """The row's input embeddings, with image features at the image tokens.

    Args:
        model: the class of the family.
        family: knows how to encode.
        input_ids: (1, N).
        images: of the row, each image once.
        image_positions: (M,) where features go.
        feature_rows: (M,) which features, in those of all images laid end to end.

    Returns:
        (1, N, D) in the model's dtype.
    """
    embeddings: Tensor = model.get_input_embeddings()(input_ids)  # type: ignore[operator]
    if not images.tiles:
        return embeddings
    tensors = moved(images.tensors, embeddings)
    if images.stage == "pixels":
        features = encode_images(family, model, tensors, images.tiles)
    elif images.stage == "vision":
        features = family.align(model, tensors["features"], images.tiles)
    else:
        features = tensors["features"]
    # Not by indexing, which adds the gradients of an image in two places up in any order.
    chosen = features.index_select(0, feature_rows).to(embeddings.dtype)
    return torch.index_copy(embeddings, 1, image_positions, chosen.unsqueeze(0))


def moved(inputs: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """Inputs on the device of a tensor, and in its dtype where they are not integers."""
    return {
        name: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
