"""Messages of other packages that a user of vlft can do nothing about."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Silences them for a command, with ``--debug`` as well."""
    # bitsandbytes looks for its optional CPU kernels at every import.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # transformers' Janus class passes deprecated arguments to its own superclass.
    logging.getLogger("transformers.generation").setLevel(logging.ERROR)
    # peft reads a deprecated attribute of transformers' models.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    # Pillow advises RGBA, but transparency is dropped, as the authors' code does.
    warnings.filterwarnings("ignore", message="Palette images with Transparency")
    # Accelerate passes a deprecated argument to DDP.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    # DeepSpeed calls deprecated functions.
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
