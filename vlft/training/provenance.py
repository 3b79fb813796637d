"""What a run was made from, for whoever repeats it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlft import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def data_digests(data_files: Sequence[str]) -> dict[str, str]:
    """SHA-256 of each data file, by its name without ``#N``."""
    paths = [Path(spec) for spec in data_files]
    plain = [path if path.exists() else Path(str(path).rpartition("#")[0]) for path in paths]
    return {str(path): digest(path) for path in plain}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
