"""The memory of GPUs, by name or as a size."""

from __future__ import annotations

import re

from vlft.errors import ConfigError

# Memory in GiB of a GPU, by its name without the maker and the series.
GPUS = {
    "t4": 15, "l4": 22.5, "a10": 22.5, "a10g": 22.5, "v100": 32, "3090": 24, "4090": 24, "5090": 32,
    "a6000": 48, "l40s": 45, "a100": 80, "h100": 80, "h200": 140, "b200": 180,
}  # fmt: skip
# A number above this is a mistyped name, not a size in GiB.
LARGEST_GPU = 256
GPU_HINT = f"a size like 24GB, or {', '.join(GPUS)}"


def gpu_gib(gpu: str) -> float:
    """Memory of a GPU in GiB, from its size or a name like ``NVIDIA A100-SXM4-40GB``.

    Raises:
        ConfigError: neither a size nor a name in ``GPUS``.
    """
    found = find_gib(gpu)
    if not found:
        raise ConfigError(f"found {gpu!r}", place="--gpu", hint=GPU_HINT)
    return found


def find_gib(gpu: str) -> float:
    """Memory of a GPU in GiB; 0 if the text is neither a size nor a name."""
    text = gpu.lower().strip()
    sized = re.fullmatch(r"(.*[\s_-])?(\d+(?:\.\d+)?)\s*gi?b", text)
    before_size = sized[1] or "" if sized else text
    name = re.sub(r"nvidia|geforce|rtx|tesla|sxm\d?|pcie|[\s_-]", "", before_size)
    if sized:
        return float(sized[2]) if name in GPUS or not before_size else 0
    number = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0
    return GPUS.get(name, number if number <= LARGEST_GPU else 0)
