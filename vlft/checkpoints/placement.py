"""Where and how a model is held, and what is set once for the device that it runs on."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from vlft import console
from vlft.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INSTALL = "pip install torch --index-url https://download.pytorch.org/whl/cu130"


@dataclass(frozen=True)
class Placement:
    """Where and how a model is held."""

    device: torch.device
    dtype: torch.dtype  # of all weights that are not quantised
    quantize: str = "none"  # or nf4, int8: of the LLM's linear layers
    attn: str = "sdpa"  # or eager, flex


def resolve_placement(*, dtype: str, device: str, quantize: str, attn: str = "auto") -> Placement:
    """The placement that flags ask for; see Placement.

    ``auto`` is a GPU if there is one, and sdpa. The dtype is float32 on the CPU; on a GPU bfloat16
    if the GPU computes with it, else float16, whatever the files hold: float16 needs a scaler and
    loses steps.

    Raises:
        ConfigError: a GPU is asked for or there, and torch cannot use it.
    """
    usable = torch.cuda.is_available()
    if not usable and (device == "cuda" or (device == "auto" and _sees_nvidia_gpu())):
        raise _no_gpu(device)
    if device == "auto":
        device = "cuda" if usable else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else _gpu_dtype()
    elif dtype == "bfloat16" and device == "cuda" and _gpu_dtype() != dtype:
        console.warn("this GPU only emulates bfloat16, which is slow; use --dtype float16")
    if attn == "flex" and device == "cpu":
        raise ConfigError(
            "found flex; torch has no backward pass of it on the CPU",
            place="--attn",
            hint="use --attn auto",
        )
    attn = "sdpa" if attn == "auto" else attn
    _set_kernels()
    return Placement(torch.device(device), DTYPES[dtype], quantize, attn)


def _gpu_dtype() -> str:
    """The 16 bit dtype that the GPU computes with. Torch emulates bfloat16 before Ampere."""
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def _set_kernels() -> None:
    """Sets how kernels are chosen, for this process.

    cuDNN's attention makes a plan for every new pair of lengths, which takes 0.05 to 1 s; rows have
    new lengths at nearly every step, replies at every token. Convolutions in TF32, torch's default,
    keep three digits of float32, which is asked for where digits matter.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = False


def _sees_nvidia_gpu() -> bool:
    """Whether the system shows an NVIDIA GPU to this process and the user has not hidden it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")
    devices = Path("/dev")
    # Windows, and Linux inside it, have no file of the device.
    windows = sys.platform == "win32" or (devices / "dxg").exists()
    found = any(devices.glob("nvidia[0-9]*")) or (
        windows and shutil.which("nvidia-smi") is not None
    )
    return found and not hidden


def _no_gpu(device: str) -> ConfigError:
    """The error of a GPU that torch cannot use, or that is not there."""
    place = f"--device {device}"
    if not _sees_nvidia_gpu():
        return ConfigError("found no usable GPU", place=place, hint="use --device cpu or auto")
    built = torch.version.cuda
    reason = f"is built for CUDA {built}, which the driver does not run" if built else "has no CUDA"
    return ConfigError(
        f"there is an NVIDIA GPU, but torch {torch.__version__} {reason}",
        place=place,
        hint=f"{INSTALL} (with a V100 or a driver before 580 cu126, see docs/gpu.md), or train on "
        "the CPU with --device cpu",
    )
