"""Messages of other packages: those that a user can do nothing about, and how others look."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.console import warn
from vlft.errors import short

if TYPE_CHECKING:
    from typing import TextIO


def quiet() -> None:
    """Silences the former for a command, with ``--debug`` as well; the others are one line each."""
    # bitsandbytes looks for its optional CPU kernels at every import.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # transformers' Janus class passes deprecated arguments to its own superclass.
    logging.getLogger("transformers.generation").setLevel(logging.ERROR)
    # peft reads a deprecated attribute of transformers' models.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    # torch's compiler looks at inputs that are no leaves.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    # Pillow advises RGBA, but transparency is dropped, as the authors' code does.
    warnings.filterwarnings("ignore", message="Palette images with Transparency")
    # Accelerate passes a deprecated argument to DDP.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    # DeepSpeed calls deprecated functions.
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated")
    warnings.showwarning = _show
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _show(
    message: Warning | str,
    category: type[Warning],  # noqa: ARG001 (what Python passes)
    filename: str,
    lineno: int,
    file: TextIO | None = None,  # noqa: ARG001
    line: str | None = None,  # noqa: ARG001
) -> None:
    """Shows a warning, which may hold text of a file, without what could steer a terminal."""
    warn(f"{short(str(message))} ({Path(filename).name}:{lineno})")
