"""Pictures -> the features that take the place of their image tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlft.data.encode import EncodedImage
    from vlft.families.base import Family
    from vlft.families.processor import Processor


def pixels_of(images: Sequence[EncodedImage], processor: Processor) -> Tensor | None:
    """(I, 3, H, W) float32 of the distinct pictures of a row, None if there is none."""
    return processor.pixel_values([image.path for image in images]) if images else None


def place_features(
    model: nn.Module,
    family: Family,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    image_positions: Tensor,
    feature_rows: Tensor,
) -> Tensor:
    """The row's input embeddings, with image features at the image tokens.

    Args:
        model: transformers' class of the family.
        family: knows how to encode.
        input_ids: (1, N).
        pixel_values: (I, 3, H, W), each picture once; None for text alone.
        image_positions: (M,) where features go.
        feature_rows: (M,) which features, in those of all pictures laid end to end.

    Returns:
        (1, N, D) in the model's dtype.
    """
    embeddings: Tensor = model.get_input_embeddings()(input_ids)  # type: ignore[operator]
    if pixel_values is None:
        return embeddings
    features = family.encode_images(model, pixel_values.to(embeddings.dtype))
    chosen = features.flatten(0, 1)[feature_rows].to(embeddings.dtype)
    return torch.index_copy(embeddings, 1, image_positions, chosen.unsqueeze(0))
