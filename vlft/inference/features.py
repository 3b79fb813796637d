"""The images of prompts -> the features that replace their tokens."""

from __future__ import annotations

from collections import ChainMap
from typing import TYPE_CHECKING, Any

import torch

from vlft.vision.batches import cut_batches, encode_batch
from vlft.vision.encode import RowImages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from vlft.data.encode import EncodedImage
    from vlft.families.processor import Processor
    from vlft.vision.encode import Stage


class Features:
    """Features of images: cached ones, those of the last call, and else new ones of the towers.

    Args:
        model: transformers' class, with peft's layers in place if there are any.
        processor: of the model.
        stage: of all features.
        cached: by the key of the image.
    """

    def __init__(
        self,
        model: Any,
        processor: Processor,
        stage: Stage = "aligned",
        cached: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model, self._processor, self._stage = model, processor, stage
        self._cached = dict(cached or {})
        self._last: dict[str, Tensor] = {}

    def of(self, images: Sequence[EncodedImage]) -> RowImages:
        """The features of distinct images, end to end.

        Raises:
            DataError: a file cannot be decoded.
        """
        known = ChainMap(self._last, self._cached)
        found = {image.key: known[image.key] for image in images if image.key in known}
        missing = [image for image in images if image.key not in found]
        for batch in cut_batches(missing, self._processor):
            views = self._processor.pixel_values(batch)
            made = encode_batch(self._model, self._processor, batch, self._stage, views)
            found.update(zip((image.key for image in batch), made, strict=True))
        self._last = found
        tiles = tuple(image.tiles for image in images)
        features = {"features": torch.cat([found[i.key] for i in images])} if images else {}
        return RowImages(self._stage, features, tiles)
