"""GPUs by name: their memory, which may be given as a size too, and what works on them."""

from __future__ import annotations

import re

from vlft.errors import ConfigError

# Memory in GiB of a GPU, by its name without the maker and the series.
GPUS = {
    "t4": 15, "l4": 22.5, "a10": 22.5, "a10g": 22.5, "v100": 32, "3090": 24, "4090": 24, "5090": 32,
    "a6000": 48, "l40s": 45, "a100": 80, "h100": 80, "h200": 140, "b200": 180,
}  # fmt: skip
# Before Ampere: bfloat16 is only emulated there, and no flash attention runs.
EMULATE_BFLOAT16 = ("t4", "v100")
# torch's builds for CUDA that have kernels for a GPU; the others take 12.6 or 13.
CUDA_BUILDS = {"v100": "12.6 (13 has dropped it)", "5090": "13", "b200": "13"}
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
    name, size = _parts(gpu)
    number = float(gpu) if re.fullmatch(r"\s*\d+(\.\d+)?\s*", gpu) else 0
    known = GPUS.get(name, number if number <= LARGEST_GPU else 0)
    return known if size is None else size if name in GPUS or not name else 0


def abilities(gpu: str) -> str:
    """What works on a named GPU, as a line; empty for a size."""
    name, _ = _parts(gpu)
    if name not in GPUS:
        return ""
    old = name in EMULATE_BFLOAT16
    trains = "float16 with a gradient scaler (bfloat16 is emulated)" if old else "bfloat16"
    quantize = "--quantize nf4" if name == "v100" else "--quantize nf4 or int8"
    builds = CUDA_BUILDS.get(name, "12.6 or 13")
    return f"{gpu}: {trains}; {quantize}; torch for CUDA {builds}"


def _parts(gpu: str) -> tuple[str, float | None]:
    """The name without the maker and the series, and the size in GiB if the text ends with one."""
    text = gpu.lower().strip()
    sized = re.fullmatch(r"(.*[\s_-])?(\d+(?:\.\d+)?)\s*gi?b", text)
    before = (sized[1] or "") if sized else text
    name = re.sub(r"nvidia|geforce|rtx|tesla|sxm\d?|pcie|[\s_-]", "", before)
    return name or before, float(sized[2]) if sized else None
