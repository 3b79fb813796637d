"""Images -> the features that replace their image tokens in the input embeddings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from vlft.families.base import encode_images

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlft.data.encode import EncodedImage, Tiles
    from vlft.families.base import Family
    from vlft.families.processor import Processor

Stage = Literal["pixels", "vision", "aligned", "codes"]


@dataclass(frozen=True)
class RowImages:
    """The distinct images of a row, as far as they are encoded.

    Attributes:
        stage: pixels; vision: features of the towers; aligned: ready to replace image tokens.
        inputs: for pixels the image inputs of the model, else ``features``: of the towers if
            vision, (R, D) if aligned.
        tiles: of each image; empty for a row of text only.
        codes: (K,) int64, of all drawn images end to end; None if there is none.
    """

    stage: Stage
    inputs: Mapping[str, Any]
    tiles: tuple[Tiles, ...]
    codes: Tensor | None = None

    def to(self, device: torch.device) -> RowImages:
        """The same on a device."""
        codes = None if self.codes is None else self.codes.to(device, non_blocking=True)
        return replace(self, inputs=on_device(self.inputs, device), codes=codes)

    def pinned(self) -> RowImages:
        """The same in pinned memory."""
        pinned = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        codes = None if self.codes is None else self.codes.pin_memory()
        return replace(self, inputs=pinned, codes=codes)


def pixels_of(images: Sequence[EncodedImage], processor: Processor) -> RowImages:
    """Distinct images of a row as pixels."""
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
    """(1, N, D) input embeddings of a row (1, N), with image features at the image tokens.

    ``image_positions`` (M,) are the positions of those tokens in the row, ``feature_rows`` (M,) the
    index of the feature at each of them, in the features of all images end to end.
    """
    embeddings: Tensor = model.get_input_embeddings()(input_ids)  # type: ignore[operator]
    if not images.tiles:
        return embeddings
    inputs = moved(images.inputs, embeddings)
    if images.stage == "pixels":
        features = encode_images(family, model, inputs, images.tiles)
    elif images.stage == "vision":
        features = family.align(model, inputs["features"], images.tiles)
    else:
        features = inputs["features"]
    # Not by indexing: if an image occurs twice, its backward adds the gradients in any order.
    chosen = features.index_select(0, feature_rows).to(embeddings.dtype)
    return torch.index_copy(embeddings, 1, image_positions, chosen.unsqueeze(0))


def on_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Inputs, which are on the CPU, with their tensors on a device; see PackedBatch.to."""
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v
        for k, v in inputs.items()
    }


def moved(inputs: Mapping[str, Any], like: Tensor) -> dict[str, Any]:
    """Inputs with their tensors on the device of a tensor, and floats also in its dtype."""
    return {
        name: value.to(like.dtype)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in on_device(inputs, like.device).items()
    }
