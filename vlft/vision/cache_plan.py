"""Where the features of a run's images are cached, and under which name."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL
import torch
from torch import Tensor

from vlft.errors import ConfigError, shown
from vlft.families.base import is_in
from vlft.files import cache_folder
from vlft.vision.batches import encode_batch, feature_lengths
from vlft.vision.shards import SUFFIX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlft.data.encode import EncodedImage
    from vlft.families.processor import Processor
    from vlft.vision.encode import Stage

# To be raised with every change to how vlft opens, resizes or normalises an image.
TREATMENT = 1


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
    """The folder of all cached features of this user.

    Raises:
        ConfigError: the user has no home folder.
    """
    return cache_folder("features", ", or use --vision-cache memory")


def plan_cache(
    asked: str, model: Any, processor: Processor, images: Sequence[EncodedImage], stage: Stage
) -> CachePlan:
    """Where the features of these distinct images are cached, for ``--vision-cache asked``."""
    if asked == "off" or not images:
        return CachePlan("off", stage, Path(), "as asked" if images else "there are no images")
    if asked == "memory":
        return CachePlan(asked, stage, Path(), "as asked")
    name = fingerprint(model, processor, stage)
    if asked == "disk":
        return CachePlan(asked, stage, cache_root() / name, "as asked")
    folder, free, reason = _free_disk(name)
    if free and any(folder.glob(f"*{SUFFIX}")):
        return CachePlan("disk", stage, folder, "it holds features of an earlier run")
    size = _size_of_features(model, processor, images, stage)
    words = f"{size / 2**20:,.0f} MiB of features"
    if size < free / 2:
        return CachePlan("disk", stage, folder, f"{words}, {free / 2**30:,.0f} GiB free on disk")
    if size < _free_memory() / 2:
        return CachePlan("memory", stage, folder, f"{words}, {reason}")
    return CachePlan("off", stage, folder, f"{words}, {reason}, and more than half of the memory")


def _free_memory() -> float:
    """Bytes of main memory that are free; without bound where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError):  # on Windows, on macOS
        return math.inf


def _free_disk(name: str) -> tuple[Path, int, str]:
    """The folder of a cache, the free bytes there, and the reason if there are too few."""
    try:
        root = cache_root()
        root.mkdir(parents=True, exist_ok=True)
        folder = root / name
        with tempfile.TemporaryFile(dir=folder if folder.exists() else root):
            free = shutil.disk_usage(root).free
    except ConfigError as error:
        return Path(), 0, error.message
    except OSError as error:
        return Path(), 0, f"{shown(root)} cannot be written ({error.strerror or error})"
    return folder, free, "the disk is nearly full"


def _size_of_features(
    model: Any, processor: Processor, images: Sequence[EncodedImage], stage: Stage
) -> int:
    """Bytes of the features of these images; the towers' are extrapolated from one."""
    if stage == "codes":
        return sum(image.codes for image in images) * torch.int64.itemsize
    if stage == "aligned":
        row: Tensor = model.get_input_embeddings().weight[0]
        return sum(image.tokens for image in images) * row.nbytes
    with torch.no_grad():
        first = encode_batch(model, processor, images[:1], stage)[0]
    return sum(feature_lengths(processor, images, stage)) * first[0].nbytes


def fingerprint(model: Any, processor: Processor, stage: Stage) -> str:
    """Hash of all that the features depend on.

    Weights and their dtype, the configuration without its text part, image settings, how vlft and
    Pillow treat an image, stage.
    """
    parts, generator = processor.family.parts, processor.family.generator
    used = parts.vision + (parts.aligner if stage == "aligned" else ())
    if stage == "codes" and generator is not None:
        used = (generator.coder,)
    config = model.config.to_dict()
    for field in ("text_config", "transformers_version"):
        config.pop(field, None)
    settings = json.dumps(config, sort_keys=True, default=str)
    versions = f"{TREATMENT} {PIL.__version__}"
    name, pixels = processor.family.name, processor.pixels.fingerprint
    if processor.pixels.rotate:
        pixels += " turned by EXIF"
    digest = hashlib.sha256(f"{name} {stage} {pixels} {settings} {versions}".encode())
    tensors = {name: t for name, t in sorted(model.state_dict().items()) if is_in(name, used)}
    with ThreadPoolExecutor() as threads:  # hashlib works outside of Python's lock.
        for (name, tensor), found in zip(
            tensors.items(), threads.map(_digest, tensors.values()), strict=True
        ):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + found)
    return digest.hexdigest()[:32]


def _digest(tensor: Tensor) -> bytes:
    values: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(values).digest()


def clear_cache() -> tuple[int, list[str]]:
    """Removes all cached features, also where the cache or a folder in it is a link.

    Returns:
        How many bytes were removed, and what could not be removed and why.
    """
    removed, problems = 0, []
    for folder in _folders():
        try:
            # A kill while safetensors writes leaves a file .tmp*.
            ours = (folder.glob(pattern) for pattern in (f"*{SUFFIX}", "*.part", ".tmp*"))
            for path in chain.from_iterable(ours):
                size = path.lstat().st_size
                path.unlink()
                removed += size
            folder.unlink() if folder.is_symlink() else folder.rmdir()
        except OSError as error:
            problems.append(f"{error.filename}: {error.strerror}")
    return removed, problems


def list_cache() -> list[tuple[str, int, int]]:
    """(fingerprint, files, bytes) of each folder of cached features."""
    rows = []
    for folder in _folders():
        files = list(folder.glob(f"*{SUFFIX}"))
        rows.append((folder.name, len(files), sum(path.stat().st_size for path in files)))
    return rows


def _folders() -> list[Path]:
    return sorted(path for path in cache_root().glob("*") if path.is_dir())
