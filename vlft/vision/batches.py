"""Images -> features, in batches; decoding runs in worker processes beside the encoding."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlft import console
from vlft.errors import DataError
from vlft.vision.encode import moved

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from vlft.data.encode import EncodedImage
    from vlft.families.processor import Processor
    from vlft.vision.encode import Stage

# Pixels in the towers at once: an image of 1,024 pixels a side, or 7 views of 384. What is encoded
# together is always the same, so that a run can be repeated to the last bit.
PIXELS_AT_ONCE = 1024**2
# Decoding in other processes pays from so many batches on.
BATCHES_FOR_WORKERS = 8


def encode_all(
    model: Any,
    processor: Processor,
    images: Sequence[EncodedImage],
    stage: Stage,
    missing: Collection[str],
    turn: tuple[int, int] = (0, 1),
) -> Iterator[tuple[str, Tensor]]:
    """(key, features) of the missing images.

    Batches are cut from all images, so that what is encoded together, and with it the last bits,
    does not depend on what an earlier run has left.

    Args:
        model: the class of the family.
        processor: of the checkpoint.
        images: distinct ones, in the order of the data.
        stage: how far they go.
        missing: keys of those that are wanted.
        turn: (i, n) takes every n-th batch from the i-th on.
    """
    wanted = [
        batch
        for batch in cut_batches(images, processor)
        if any(image.key in missing for image in batch)
    ]
    batches = wanted[turn[0] :: turn[1]]
    workers = _workers(len(batches))
    loader: DataLoader[Tensor | None] = DataLoader(
        _Decoded(batches, processor),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        # Its own: it must not draw from the one that dropout draws from.
        generator=torch.Generator(),
    )
    live = Progress(console=console.err, disable=not console.err.is_terminal, transient=True)
    with live, torch.no_grad():
        task = live.add_task("encoding images", total=sum(map(len, batches)))
        for batch, views in zip(batches, loader, strict=True):
            found = encode_batch(model, processor, batch, stage, views)
            for image, kept in zip(batch, found, strict=True):
                if image.key in missing:
                    yield image.key, kept
            live.advance(task, len(batch))


def encode_batch(
    model: Any,
    processor: Processor,
    images: Sequence[EncodedImage],
    stage: Stage,
    views: Tensor | None = None,
) -> list[Tensor]:
    """The features of each image, on the CPU: (views, T, W) or, if aligned, (tokens, D)."""
    family, tiles = processor.family, [image.tiles for image in images]
    # Features may be stored under the digest of an image, so they must come from these bytes.
    views = processor.pixel_values(images, verify=True) if views is None else views
    weight = model.get_input_embeddings().weight
    inputs = moved(processor.pixels.inputs(views, tiles), weight)
    # As in training, where Accelerate computes so.
    half = weight.dtype != torch.float32
    with torch.autocast(weight.device.type, dtype=weight.dtype if half else None, enabled=half):
        rows = family.vision_features(model, inputs)
        if stage == "aligned":
            rows = family.align(model, rows, tiles)
    rows = rows.to(weight.dtype)
    if stage == "aligned":
        sizes = [image.tokens for image in images]
    else:
        sizes = [1 + across * down for across, down in tiles]
    return [part.cpu() for part in torch.split(rows, sizes)]


def cut_batches(images: Sequence[EncodedImage], processor: Processor) -> list[list[EncodedImage]]:
    """Images that go through the towers together, in their order."""
    size = processor.pixels.size
    batches: list[list[EncodedImage]] = []
    used = 0
    for image in images:
        pixels = (1 + image.tiles[0] * image.tiles[1]) * size * size
        if not batches or used + pixels > PIXELS_AT_ONCE:
            batches.append([])
            used = 0
        batches[-1].append(image)
        used += pixels
    return batches


class _Decoded(Dataset["Tensor | None"]):
    """The views of each batch of images, verified; runs in worker processes."""

    def __init__(self, batches: Sequence[Sequence[EncodedImage]], processor: Processor) -> None:
        self._batches, self._processor = batches, processor

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Tensor | None:
        """(V, 3, H, W); None on an error, which the main process meets again and raises whole."""
        try:
            return self._processor.pixel_values(self._batches[index], verify=True)
        except DataError:
            return None


def _workers(batches: int) -> int:
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(4, max(1, cores // 2)) if batches >= BATCHES_FOR_WORKERS else 0
