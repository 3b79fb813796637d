"""Images -> features, in batches; threads decode the next ones while the towers encode."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlft.console import tracked
from vlft.distributed import SINGLE
from vlft.errors import CheckpointError, explaining_memory, shown
from vlft.families.base import is_in
from vlft.vision.encode import moved

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from concurrent.futures import Future

    from vlft.data.encode import EncodedImage, Tiles
    from vlft.distributed import World
    from vlft.families.base import Views
    from vlft.families.processor import Processor
    from vlft.vision.encode import Stage

# Pixels per batch: one image of 1024 x 1024, or 7 views of 384 x 384. A constant, because the size
# of a batch changes the last bits of its features, and a run must be repeatable bit for bit.
PIXELS_AT_ONCE = 1024**2
# What makes the encoding of images take less memory. Batches are small already.
SMALLER = (
    "use --quantize nf4 or --dtype bfloat16, or for pages a smaller --image-mode or --max-tiles"
)
# Batches that each thread decodes ahead.
AHEAD = 2


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
    items = _decoded(processor, batches)
    with torch.no_grad():
        for batch, views in tracked(items, "encoding images", len(batches)):
            place = str(next(model.parameters()).device)
            with explaining_memory(f"while {len(batch)} images are encoded", SMALLER, place):
                found = encode_batch(model, processor, batch, stage, views)
            for image, features in zip(batch, found, strict=True):
                if image.key in missing:
                    yield image.key, features


def encode_batch(
    model: Any,
    processor: Processor,
    images: Sequence[EncodedImage],
    stage: Stage,
    views: list[Views] | None = None,
) -> list[Tensor]:
    """The features of each image on the CPU: (tokens, D) if aligned, else as in Pixels.rows."""
    family, tiles = processor.family, [image.tiles for image in images]
    # Features may be stored under the digest of an image, so they must come from these bytes.
    views = processor.pixel_values(images, verify=True) if views is None else views
    if stage == "codes":
        return _encode_codes(model, processor, views, tiles)
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
    sizes = feature_lengths(processor, images, stage)
    return [part.cpu() for part in torch.split(rows, sizes)]


def _encode_codes(
    model: Any, processor: Processor, views: list[Views], tiles: list[Tiles]
) -> list[Tensor]:
    """The codes of each drawn image, (K,) int64 on the CPU.

    Raises:
        CheckpointError: the model gives another number of codes than an image has.
    """
    generator = processor.family.generator
    assert generator is not None
    pixels = processor.pixels.inputs(views, tiles)["pixel_values"]
    device = next(model.get_submodule(generator.coder).parameters()).device
    codes = generator.encode(model, pixels.to(device)).cpu()
    if codes.shape[1] != processor.pixels.tokens:
        found = f"{codes.shape[1]} codes of an image, {processor.pixels.tokens} are expected"
        hint = "its config.json does not fit its VQ model"
        raise CheckpointError(found, place=shown(model.name_or_path), hint=hint)
    return list(codes)


def feature_lengths(
    processor: Processor, images: Sequence[EncodedImage], stage: Stage
) -> list[int]:
    """The length of the first axis of each image's features."""
    if stage in ("aligned", "codes"):
        return [image.codes or image.tokens for image in images]
    return [processor.pixels.rows(image.tiles) for image in images]


def cut_batches(images: Sequence[EncodedImage], processor: Processor) -> list[list[EncodedImage]]:
    """The images in batches of at most PIXELS_AT_ONCE, or of one larger image, in order."""
    batches: list[list[EncodedImage]] = []
    used = 0
    for image in images:
        pixels = sum(views * side**2 for views, side in processor.pixels.sizes(image.tiles))
        if not batches or used + pixels > PIXELS_AT_ONCE:
            batches.append([])
            used = 0
        batches[-1].append(image)
        used += pixels
    return batches


def _decoded(
    processor: Processor, batches: Sequence[Sequence[EncodedImage]]
) -> Iterator[tuple[Sequence[EncodedImage], list[Views]]]:
    """The batches with the views of their images, verified; threads decode the next ones."""
    waiting: deque[tuple[Sequence[EncodedImage], Future[list[Views]]]] = deque()
    with ThreadPoolExecutor(_threads()) as pool:
        for batch in batches:
            waiting.append((batch, pool.submit(processor.pixel_values, batch, verify=True)))
            if len(waiting) == batches_ahead():
                first, views = waiting.popleft()
                yield first, views.result()
        for batch, views in waiting:
            yield batch, views.result()


def batches_ahead() -> int:
    """Number of batches that are decoded or being decoded, that of the towers included."""
    return AHEAD * _threads()


def _threads() -> int:
    """Number of threads that decode. Pillow and numpy compute without Python's lock."""
    # macOS and Windows cannot tell which cores this process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, max(1, (cores or 1) // 2))
