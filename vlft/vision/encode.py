"""Pictures -> the features that take the place of their image tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlft.families.base import Family


def place_features(
    model: nn.Module,
    family: Family,
    input_ids: Tensor,
    images: Mapping[str, Tensor],
    image_positions: Tensor,
    feature_rows: Tensor,
) -> Tensor:
    """The row's input embeddings, with image features at the image tokens.

    Args:
        model: the class of the family.
        family: knows how to encode.
        input_ids: (1, N).
        images: the model's inputs of the row's pictures, each once; empty for text alone.
        image_positions: (M,) where features go.
        feature_rows: (M,) which features, in those of all pictures laid end to end.

    Returns:
        (1, N, D) in the model's dtype.
    """
    embeddings: Tensor = model.get_input_embeddings()(input_ids)  # type: ignore[operator]
    if not images:
        return embeddings
    features = family.encode_images(model, moved(images, embeddings))
    # Not by indexing, which adds the gradients of a picture in two places up in any order.
    chosen = features.index_select(0, feature_rows).to(embeddings.dtype)
    return torch.index_copy(embeddings, 1, image_positions, chosen.unsqueeze(0))


def moved(inputs: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """Inputs on the device of a tensor, and in its dtype where they are not integers."""
    return {
        name: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
