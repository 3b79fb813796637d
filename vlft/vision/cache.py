"""The vision cache: frozen towers encode every distinct image once, before the first step.

    images of all samples -> distinct by content and tiles -> those not on disk -> decoded by
    threads, encoded in batches -> features in memory, or in checked files on disk

The cached features are the input of the first trained module: aligned features if the aligner is
frozen, else features of the towers.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlft import console
from vlft.data.images import check_unchanged
from vlft.distributed import SINGLE
from vlft.errors import DataError, shown
from vlft.vision.batches import encode_all
from vlft.vision.encode import RowImages, pixels_of
from vlft.vision.shards import changed_file, read_shards, states, write_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from vlft.data.encode import EncodedImage
    from vlft.distributed import World
    from vlft.families.processor import Processor
    from vlft.vision.cache_plan import CachePlan
    from vlft.vision.encode import Stage
    from vlft.vision.shards import State

# A file of features is closed when it reaches this size, or this age.
SHARD_BYTES, SHARD_SECONDS = 256 * 2**20, 30.0


@dataclass
class Images:
    """The source of a run's images: cached features, or pixels if nothing is cached.

    Attributes:
        stage: of the cached features; pixels if there are none.
        features: cached features by the key of the image.
        encoded: number of images encoded by the towers so far.
        reused: number of images whose features an earlier run left on disk.
        files: that hold the features, as they were when they were read.
        codes: (K,) int64 codes of the drawn images, by the key of the image.
    """

    processor: Processor
    stage: Stage = "pixels"
    features: Mapping[str, Tensor] = field(default_factory=dict)
    encoded: int = 0
    reused: int = 0
    files: Mapping[Path, State] = field(default_factory=dict)
    codes: Mapping[str, Tensor] = field(default_factory=dict)

    def problem_with(self, images: Iterable[EncodedImage]) -> DataError | None:
        """Why one of these images, or a file with features, cannot be read any more."""
        if path := changed_file(self.files):
            hint = "go on with vlft sft --resume RUN: what it held is encoded again"
            return DataError("changed while the run used it", place=shown(path), hint=hint)
        for image in {image.key: image for image in images}.values():
            try:
                self._check(image)
            except DataError as error:
                return error
        return None

    def _check(self, image: EncodedImage) -> None:
        """Raises DataError if an image, or what is cached of it, is not what it was."""
        if image.drawn:
            self.codes[image.key]
        elif self.stage == "pixels":
            check_unchanged(image.path, image.digest)
        else:
            self.features[image.key]

    def of(self, images: Sequence[EncodedImage], drawn: Sequence[EncodedImage] = ()) -> RowImages:
        """What a row needs of each distinct image: features or pixels, and codes if it is drawn."""
        codes = torch.cat([self.codes[image.key] for image in drawn]) if drawn else None
        if self.stage == "pixels" or not images:
            self.encoded += len(images)
            return replace(pixels_of(images, self.processor), codes=codes)
        cached = torch.cat([self.features[image.key] for image in images])
        tiles = tuple(image.tiles for image in images)
        return RowImages(self.stage, {"features": cached}, tiles, codes)


def fill(
    plan: CachePlan,
    model: Any,
    processor: Processor,
    images: Sequence[EncodedImage],
    world: World = SINGLE,
) -> Images:
    """The features of these distinct images; those that are not cached yet are encoded.

    On disk, ranks share the work, and what is encoded when a run stops is kept. In memory, every
    rank encodes all images.
    """
    if plan.where == "off":
        return Images(processor)
    encode = functools.partial(encode_all, model, processor, images, plan.stage)
    keys = [image.key for image in images]
    made: dict[str, Tensor] = {}
    features: Mapping[str, Tensor] = made
    if plan.where == "disk":
        features, problems = read_shards(plan.folder, keys)
        for problem in problems:
            console.warn(f"vision cache: {problem}; encoded again")
    reused = len(features)
    encoded = len(images) - reused
    missing = set(keys) - features.keys()
    # No rank may write before all have read, so that all agree on what is missing.
    world.barrier()
    started = time.perf_counter()
    if plan.where == "memory":
        world.together(lambda: made.update(encode(missing)))
    elif any(world.all_gather(bool(missing))):
        features = _encode_to_disk(plan.folder, keys, encode, missing, world)
    seconds = time.perf_counter() - started
    rate = f", {encoded / seconds:,.1f} images/s" if encoded else ""
    console.info(
        f"{'codes' if plan.stage == 'codes' else 'vision cache'} ({plan.where}: {plan.reason}): "
        f"{encoded} images encoded, "
        f"{reused} from earlier runs{rate}"
    )
    files = states(plan.folder) if plan.where == "disk" else {}
    return Images(processor, plan.stage, features, encoded, reused, files)


def release_towers(model: nn.Module, processor: Processor) -> None:
    """Moves the towers to the CPU: with cached features, only export still needs them.

    So does what codes images.
    """
    if torch.cuda.is_available():
        generator = processor.family.generator
        coder = (generator.coder,) if generator is not None else ()
        for name, module in model.named_modules():
            if name in (*processor.family.parts.vision, *coder):
                module.to("cpu")
        torch.cuda.empty_cache()


def _encode_to_disk(
    folder: Path,
    keys: Sequence[str],
    encode: Callable[..., Iterator[tuple[str, Tensor]]],
    missing: Collection[str],
    world: World,
) -> Mapping[str, Tensor]:
    """The features of all keys, mapped from files, to which the missing ones are added."""
    world.together(lambda: _write_all(encode(missing, world), folder))
    features, _ = read_shards(folder, keys)
    # Ranks on another machine wrote to a disk that is not shared.
    missing = set(keys) - features.keys()
    world.together(lambda: _write_all(encode(missing), folder))
    return read_shards(folder, keys)[0] if missing else features


def _write_all(encoded: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Writes features file by file while they are encoded; an interruption loses none of them."""
    waiting: dict[str, Tensor] = {}
    size, written = 0, time.monotonic()
    try:
        for key, tensor in encoded:
            waiting[key] = tensor
            size += tensor.numel() * tensor.element_size()
            if size >= SHARD_BYTES or time.monotonic() - written > SHARD_SECONDS:
                write_shard(folder, waiting)
                waiting, size, written = {}, 0, time.monotonic()
    finally:
        if waiting:
            write_shard(folder, waiting)
