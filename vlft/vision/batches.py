"""Images -> features, in batches; worker processes decode while the towers encode."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vlft.console import tracked
from vlft.distributed import SINGLE
from vlft.errors import DataError
from vlft.families.base import is_in
from vlft.vision.encode import moved

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from vlft.data.encode import EncodedImage
    from vlft.distributed import World
    from vlft.families.processor import Processor
    from vlft.vision.encode import Stage

# Pixels per batch: one image of 1024 x 1024, or 7 views of 384 x 384. A constant, because the size
# of a batch changes the last bits of its features, and a run must be repeatable bit for bit.
PIXELS_AT_ONCE = 1024**2
# Fewer batches are decoded in the main process, sooner than worker processes would start.
BATCHES_FOR_WORKERS = 8


def encode_all(
    model: Any,
    processor: Processor,
    images: Sequence[EncodedImage],
    stage: Stage,
    missing: Collection[str],
    world: World = SINGLE,
) -> Iterator[tuple[str, Tensor]]:
    """(key, features) of the images with the missing keys, or of this rank's share of them.

    Batches are cut from all images, which are distinct and in the order of the data, so that the
    batch of an image, and with it the last bits of its features, does not depend on what is cached.
    """
    cut = cut_batches(images, processor)
    wanted = [batch for batch in cut if any(image.key in missing for image in batch)]
    batches = wanted[world.rank :: world.size]
    workers = _workers(len(batches))
    loader: DataLoader[Tensor | None] = DataLoader(
        batches,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=functools.partial(_decode, processor),
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        # Drawing from the default generator would change the dropout masks of the run.
        generator=torch.Generator(),
    )
    items = zip(batches, loader, strict=True)
    with torch.no_grad():
        for batch, views in tracked(items, "encoding images", len(batches)):
            found = encode_batch(model, processor, batch, stage, views)
            for image, features in zip(batch, found, strict=True):
                if image.key in missing:
                    yield image.key, features


def encode_batch(
    model: Any,
    processor: Processor,
    images: Sequence[EncodedImage],
    stage: Stage,
    views: Tensor | None = None,
) -> list[Tensor]:
    """The features of each image on the CPU: (tokens, D) if aligned, else (views, T, W)."""
    family, tiles = processor.family, [image.tiles for image in images]
    # Features may be stored under the digest of an image, so they must come from these bytes.
    views = processor.pixel_values(images, verify=True) if views is None else views
    # Not that of the word embeddings, which full tuning holds in float32 beside towers in 16 bit.
    weight = next(p for name, p in model.named_parameters() if is_in(name, family.parts.vision))
    inputs = moved(processor.pixels.inputs(views, tiles), weight)
    # The same autocast as Accelerate applies in training.
    half = weight.dtype != torch.float32
    with torch.autocast(weight.device.type, dtype=weight.dtype if half else None, enabled=half):
        rows = family.vision_features(model, inputs)
        if stage == "aligned":
            rows = family.align(model, rows, tiles)
    rows = rows.to(weight.dtype)
    sizes = [image.tokens if stage == "aligned" else image.views for image in images]
    return [part.cpu() for part in torch.split(rows, sizes)]


def cut_batches(images: Sequence[EncodedImage], processor: Processor) -> list[list[EncodedImage]]:
    """The images in batches of at most PIXELS_AT_ONCE, or of one larger image, in order."""
    size = processor.pixels.size
    batches: list[list[EncodedImage]] = []
    used = 0
    for image in images:
        pixels = image.views * size * size
        if not batches or used + pixels > PIXELS_AT_ONCE:
            batches.append([])
            used = 0
        batches[-1].append(image)
        used += pixels
    return batches


def _decode(processor: Processor, images: Sequence[EncodedImage]) -> Tensor | None:
    """(V, 3, H, W), verified; None on an error, which the main process meets again and raises.

    A worker process could raise it with a traceback in its message only.
    """
    try:
        return processor.pixel_values(images, verify=True)
    except DataError:
        return None


def _workers(batches: int) -> int:
    """Number of worker processes that decode so many batches."""
    if batches < BATCHES_FOR_WORKERS:
        return 0
    # macOS and Windows cannot tell which cores this process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, max(1, (cores or 1) // 2))
