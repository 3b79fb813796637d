"""Where the features of a run's images are cached, and under which name."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlft.families.base import is_in
from vlft.vision.batches import encode_batch
from vlft.vision.shards import SUFFIX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlft.data.encode import EncodedImage
    from vlft.families.processor import Processor
    from vlft.vision.encode import Stage


@dataclass(frozen=True)
class CachePlan:
    """Where features are cached.

    Attributes:
        where: disk, memory or off.
        stage: vision or aligned.
        folder: of the features on disk.
        reason: for the choice, shown to the user.
    """

    where: str
    stage: Stage
    folder: Path
    reason: str


def cache_root() -> Path:
    """The folder of all cached features of this user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vlft" / "features"


def plan_cache(
    asked: str, model: Any, processor: Processor, images: Sequence[EncodedImage], stage: Stage
) -> CachePlan:
    """Where the features of these distinct images are cached, for ``--vision-cache asked``."""
    if asked == "off" or not images:
        return CachePlan("off", stage, Path(), "as asked" if images else "there are no images")
    folder = cache_root() / fingerprint(model, processor, stage)
    if asked != "auto":
        return CachePlan(asked, stage, folder, "as asked")
    if any(folder.glob(f"*{SUFFIX}")):
        return CachePlan("disk", stage, folder, "it holds features of an earlier run")
    size = _size_of_features(model, processor, images, stage)
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    words = f"{size / 2**20:,.0f} MiB of features"
    if size < free / 2:
        return CachePlan("disk", stage, folder, f"{words}, {free / 2**30:,.0f} GiB free on disk")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if size < memory / 2:
        return CachePlan("memory", stage, folder, f"{words}, the disk is nearly full")
    return CachePlan("off", stage, folder, f"{words}, more than half of the free disk and memory")


def _size_of_features(
    model: Any, processor: Processor, images: Sequence[EncodedImage], stage: Stage
) -> int:
    """Bytes of the features of these images, extrapolated from the first."""
    with torch.no_grad():
        first = encode_batch(model, processor, images[:1], stage)[0]
    rows = sum(image.tokens if stage == "aligned" else image.views for image in images)
    return rows * first[0].numel() * first.element_size()


def fingerprint(model: Any, processor: Processor, stage: Stage) -> str:
    """Hash of all that the features depend on: weights, dtype, image settings, stage."""
    parts = processor.family.parts
    used = parts.vision + (parts.aligner if stage == "aligned" else ())
    digest = hashlib.sha256(
        f"{processor.family.name} {stage} {processor.pixels.fingerprint}".encode()
    )
    for name, tensor in sorted(model.state_dict().items()):
        if is_in(name, used):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def clear_cache() -> int:
    """Removes all cached features; returns how many bytes they had."""
    size = sum(size for _, _, size in list_cache())
    shutil.rmtree(cache_root(), ignore_errors=True)
    return size


def list_cache() -> list[tuple[str, int, int]]:
    """(fingerprint, files, bytes) of each folder of cached features."""
    rows = []
    for folder in sorted(path for path in cache_root().glob("*") if path.is_dir()):
        files = list(folder.glob(f"*{SUFFIX}"))
        rows.append((folder.name, len(files), sum(path.stat().st_size for path in files)))
    return rows
