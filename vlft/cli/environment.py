"""``vlft env``: what a report of a fault needs to know of the machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlft import __version__
from vlft.console import out
from vlft.data.image_cache import KEPT, size_of_cache
from vlft.errors import VlftError, printable
from vlft.vision.cache_plan import cache_root, list_cache

if TYPE_CHECKING:
    from vlft.config import EnvConfig

# vlft's own packages, then those of its extras, which are shown if they are there.
PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors",
    "huggingface_hub", "numpy", "pillow",
)  # fmt: skip
EXTRAS = (
    "datasets", "pyarrow", "modelscope", "pillow-heif", "pypdfium2", "deepspeed", "tensorboard",
    "wandb", "triton", "fastapi", "uvicorn",
)  # fmt: skip
# Variables that change what vlft does, and hold no secrets.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "HF_HUB_OFFLINE", "HF_ENDPOINT", "ATEN_CPU_CAPABILITY", "LOCAL_RANK", "WORLD_SIZE",
)  # fmt: skip
GIB = 2**30
COLUMNS = 80


def run_env(config: EnvConfig) -> None:
    """Prints the environment as a block to paste into a report, or as JSON."""
    found = environment()
    if config.json:
        out.print(json.dumps(found, indent=1, ensure_ascii=False), markup=False)
        return
    width = max(map(len, found))
    out.print("```", markup=False)
    for name, value in found.items():
        shown = printable(", ".join(value) if isinstance(value, list) else str(value))
        lines = textwrap.wrap(shown, COLUMNS - width - 2)
        text = textwrap.indent("\n".join(lines), " " * (width + 2))
        out.print(name + text[len(name) :], markup=False, soft_wrap=True)
    out.print("```", markup=False)


def environment() -> dict[str, Any]:
    """What vlft runs on, by name: texts and lists of texts. It holds no secrets and no names."""
    versions = {name: _version(name) for name in PACKAGES}
    extras = {name: _version(name) for name in EXTRAS}
    return {
        "vlft": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.platform()}, {platform.machine()}",
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores, {_cpu_instructions()}",
        "memory": _memory(),
        "packages": [f"{name} {version or 'missing'}" for name, version in versions.items()],
        "extras": [f"{name} {version}" for name, version in extras.items() if version] or ["none"],
        "torch is for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU",
        "gpus": _gpus() or ["none that torch can use"],
        "works": _abilities(),
        "caches": _caches(),
        "variables": [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
        or ["none"],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """As Linux names it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _cpu_instructions() -> str:
    return str(torch.backends.cpu.get_cpu_capability())


def _memory() -> str:
    """Of the machine and free on the disk of the working folder."""
    disk = f"{shutil.disk_usage(Path.cwd()).free / GIB:,.0f} GiB free on this disk"
    if not hasattr(os, "sysconf"):
        return disk
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:,.0f} GiB, {disk}"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        memory = f"{of.total_memory / GIB:,.0f} GiB"
        found.append(f"{of.name} ({memory}, compute capability {of.major}.{of.minor})")
    return found


def _abilities() -> list[str]:
    """What was tried, with a word on what does not work."""
    on_gpu = torch.cuda.is_available()
    native = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return [
        f"bfloat16 {'yes' if native or not on_gpu else 'emulated'}",
        f"nf4 {_tried_nf4()}",
        f"--attn flex {'yes' if on_gpu else 'no, it needs a GPU'}",
        f"torch.compile {_finds_compiler()}",
    ]


def _tried_nf4() -> str:
    """Stores a small matrix in 4 bit and reads it."""
    from bitsandbytes import functional

    weights = torch.ones(64, 64, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        stored, state = functional.quantize_4bit(weights, quant_type="nf4")
        read = functional.dequantize_4bit(stored, state)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return f"no ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    return "yes" if torch.equal(read, weights) else "no, it reads other numbers than it stored"


def _finds_compiler() -> str:
    """Inductor needs a C++ compiler for the CPU, and Triton for a GPU."""
    if torch.cuda.is_available():
        return "yes" if _version("triton") else "no, triton is missing"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return "yes" if compiler else "no, there is no C++ compiler"


def _caches() -> list[str]:
    """Their names and sizes."""
    try:
        features = sum(size for _, _, size in list_cache())
        sizes = {name: size_of_cache(name)[1] for name in KEPT}
        root = cache_root().parent
    except VlftError as error:
        return [error.message]
    home = str(Path.home())
    place = str(root).replace(home, "~", 1) if str(root).startswith(home) else str(root)
    sizes = {"features": features, **sizes}
    used = [f"{name} {size / 2**20:,.1f} MiB" for name, size in sizes.items() if size]
    return [place, *(used or ["empty"])]
