"""The images of a run: features of those that the model sees, codes of those that it draws."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlft.families.base import is_in
from vlft.training.samples import distinct_images
from vlft.vision.cache import Images, fill
from vlft.vision.cache_plan import plan_cache

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from vlft.config import SftConfig
    from vlft.data.dataset import Dataset
    from vlft.data.encode import EncodedImage
    from vlft.families.processor import Processor
    from vlft.training.backend import Backend
    from vlft.vision.encode import Stage


def prepare_images(
    config: SftConfig,
    processor: Processor,
    model: Any,
    data: tuple[Dataset, Dataset],
    backend: Backend,
) -> Images:
    """Where rows get their images from: cached features, unless the vision tower trains."""
    parts = processor.family.parts
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    known = distinct_images(data)
    codes = _encode_drawn(
        config, processor, model, [image for image in known if image.drawn], backend
    )
    if any(is_in(name, parts.vision) for name in trained):
        return Images(processor, codes=codes)
    images = [image for image in known if not image.drawn]
    trains_aligner = any(is_in(name, parts.aligner) for name in trained)
    stage: Stage = "vision" if trains_aligner else "aligned"
    plan = backend.world.on_rank_zero(
        lambda: plan_cache(config.vision_cache, model, processor, images, stage)
    )
    if images:
        backend.check_cache(plan)
    return replace(fill(plan, model, processor, images, backend.world), codes=codes)


def _encode_drawn(
    config: SftConfig,
    processor: Processor,
    model: Any,
    images: Sequence[EncodedImage],
    backend: Backend,
) -> Mapping[str, Tensor]:
    """The codes of the images that are drawn, by key; the VQ encoder is always frozen."""
    if not images:
        return {}
    asked = config.vision_cache
    plan = backend.world.on_rank_zero(lambda: plan_cache(asked, model, processor, images, "codes"))
    backend.check_cache(plan)
    if plan.where == "off":
        # Not encoded again in every epoch: codes take a thousandth of the memory of features.
        plan = replace(plan, where="memory")
    return fill(plan, model, processor, images, backend.world).features
