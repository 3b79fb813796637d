"""What a run was made from, so that it can be repeated."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from vlft import __version__
from vlft.checkpoints.runs import data_digests, digest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "pillow")


def provenance(model: Path, data_files: Sequence[str]) -> dict[str, Any]:
    """Versions, machine, command, and SHA-256 of the data files and of the model's config."""
    cuda = torch.cuda.is_available()
    return {
        "vlft": __version__,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "model_config": digest(model / "config.json"),
        "data": data_digests(data_files),
    }
