"""Messages of other packages that say nothing to a user of vlft."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Silences them for a command; ``--debug`` does not bring them back, Python's -W does."""
    # The CPU kernels of bitsandbytes are optional, and looked for at every import.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Janus' class passes its own superclass what that one advises against.
    logging.getLogger("transformers.generation").setLevel(logging.ERROR)
    # peft asks transformers by a name that is on its way out.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    # The authors' code drops transparency, whichever way the file has it.
    warnings.filterwarnings("ignore", message="Palette images with Transparency")
    # Accelerate knows only the older name.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    # So does DeepSpeed.
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
