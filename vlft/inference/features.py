"""The images of prompts -> the features that replace their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlft.console import info
from vlft.errors import ConfigError
from vlft.vision.batches import cut_batches, encode_batch
from vlft.vision.cache_plan import cache_root, fingerprint
from vlft.vision.encode import RowImages
from vlft.vision.shards import SUFFIX, read_shards

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
        self._cached: Mapping[str, Tensor] = {} if cached is None else cached
        self._last: dict[str, Tensor] = {}

    def of(self, images: Sequence[EncodedImage]) -> RowImages:
        """The features of distinct images, end to end.

        Raises:
            DataError: a file cannot be decoded.
        """
        sources = (self._last, self._cached)
        found = {
            image.key: source[image.key]
            for source in sources
            for image in images
            if image.key in source
        }
        missing = [image for image in images if image.key not in found]
        for batch in cut_batches(missing, self._processor):
            views = self._processor.pixel_values(batch)
            made = encode_batch(self._model, self._processor, batch, self._stage, views)
            found.update(zip((image.key for image in batch), made, strict=True))
        self._last = found
        tiles = tuple(image.tiles for image in images)
        features = {"features": torch.cat([found[i.key] for i in images])} if images else {}
        return RowImages(self._stage, features, tiles)


def find_features(
    asked: str, model: Any, processor: Processor, images: Sequence[EncodedImage]
) -> Features:
    """Features with those that a run of ``vlft sft`` has left on disk; see ``--vision-cache``.

    Args:
        asked: auto or off.
        model: transformers' class, with peft's layers in place if there are any.
        processor: of the model.
        images: all distinct images that will be asked for.
    """
    try:
        root = cache_root()
    except ConfigError:  # the user has no home folder
        return Features(model, processor)
    if asked == "auto" and images and any(root.glob(f"*/*{SUFFIX}")):
        keys = [image.key for image in images]
        stages: tuple[Stage, ...] = ("aligned", "vision")
        for stage in stages:
            cached, _ = read_shards(root / fingerprint(model, processor, stage), keys)
            if cached:
                info(f"vision cache: {len(cached)} of {len(images)} images from earlier runs")
                return Features(model, processor, stage, cached)
    return Features(model, processor)
