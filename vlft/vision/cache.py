"""Every distinct image through the frozen towers once: before step one, and never again.

    images of all samples ── distinct by content and treatment ── those not on disk ── decoded in
    worker processes, encoded in batches ── features in memory, or in checked files on disk

The features kept are those before the first trained module: after the aligner if it is frozen too,
else before it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlft import console
from vlft.distributed import SINGLE
from vlft.vision.batches import encode_all
from vlft.vision.encode import RowImages, pixels_of
from vlft.vision.shards import read_shards, write_shard

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from vlft.data.encode import EncodedImage
    from vlft.distributed import World
    from vlft.families.processor import Processor
    from vlft.vision.cache_plan import CachePlan
    from vlft.vision.encode import Stage

# Bytes of a file.
SHARD_BYTES = 256 * 2**20


@dataclass
class Images:
    """Where a run's rows get their images from.

    Attributes:
        processor: of the checkpoint.
        stage: how far the kept features are; pixels if none are kept.
        features: by the image's key.
        encoded: images that went through the towers so far.
        reused: images whose features an earlier run had left.
    """

    processor: Processor
    stage: Stage = "pixels"
    features: Mapping[str, Tensor] = field(default_factory=dict)
    encoded: int = 0
    reused: int = 0

    def of(self, images: Sequence[EncodedImage]) -> RowImages:
        """The distinct images of a row."""
        if self.stage == "pixels" or not images:
            self.encoded += len(images)
            return pixels_of(images, self.processor)
        kept = torch.cat([self.features[image.key] for image in images])
        return RowImages(self.stage, {"features": kept}, tuple(image.tiles for image in images))


def fill(
    plan: CachePlan,
    model: Any,
    processor: Processor,
    images: Sequence[EncodedImage],
    world: World = SINGLE,
) -> Images:
    """Encodes what is not there yet.

    Stopped in the middle, what was encoded until then stays on disk. Several processes divide the
    images among them if they meet on a disk; in memory, each encodes all.

    Args:
        plan: where to.
        model: the class of the family.
        processor: of the checkpoint.
        images: distinct ones, in the order of the data.
        world: of the run.
    """
    if plan.where == "off":
        return Images(processor)
    features: dict[str, Tensor] = {}
    if plan.where == "disk":
        features, problems = read_shards(plan.folder, [image.key for image in images])
        for problem in problems:
            console.warn(f"vision cache: {problem}; encoded again")
    reused = len(features)
    encoded = len(images) - reused
    missing = {image.key for image in images if image.key not in features}
    # The same in all, whatever another process has written meanwhile.
    world.barrier()
    started = time.perf_counter()
    if plan.where == "memory":
        features.update(encode_all(model, processor, images, plan.stage, missing))
    elif any(world.all_gather(bool(missing))):
        turn = (world.rank, world.size)
        write_all(encode_all(model, processor, images, plan.stage, missing, turn), plan.folder)
        world.barrier()
        # From the files from now on, mapped instead of held.
        features, _ = read_shards(plan.folder, [image.key for image in images])
        missing = {image.key for image in images if image.key not in features}
        if missing:  # Another process wrote them to a disk that is not here.
            write_all(encode_all(model, processor, images, plan.stage, missing), plan.folder)
            features, _ = read_shards(plan.folder, [image.key for image in images])
    seconds = time.perf_counter() - started
    rate = f", {encoded / seconds:,.1f} images/s" if encoded else ""
    console.info(
        f"vision cache ({plan.where}: {plan.reason}): {encoded} images encoded, "
        f"{reused} from earlier runs{rate}"
    )
    return Images(processor, plan.stage, features, encoded, reused)


def release_towers(model: nn.Module, processor: Processor) -> None:
    """Takes the towers off the GPU; they are still there to be written with the model."""
    for name in processor.family.parts.vision:
        owner, _, leaf = name.rpartition(".")
        part = getattr(model.get_submodule(owner), leaf)
        if isinstance(part, nn.Module) and torch.cuda.is_available():
            part.to("cpu")
            torch.cuda.empty_cache()


def write_all(made: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Writes features as they come, a file at a time; what a stop finds in hand is written too."""
    waiting: dict[str, Tensor] = {}
    size = 0
    try:
        for key, tensor in made:
            waiting[key] = tensor
            size += tensor.numel() * tensor.element_size()
            if size >= SHARD_BYTES:
                write_shard(folder, waiting)
                waiting, size = {}, 0
    finally:
        if waiting:
            write_shard(folder, waiting)
