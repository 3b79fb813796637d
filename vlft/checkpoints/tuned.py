"""A checkpoint of ``vlft sft`` -> what is needed to run or merge it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlft.checkpoints.adapter import is_adapter
from vlft.checkpoints.locate import ModelFolder, describe, locate_model
from vlft.checkpoints.runs import find_checkpoint, read_run_config
from vlft.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from vlft.config import SftConfig


@dataclass(frozen=True)
class Tuned:
    """A checkpoint and its base.

    Attributes:
        checkpoint: the checkpoint-N folder.
        settings: of the run.
        base: the model that the adapter belongs to; for a full run the checkpoint itself.
        adapter: the folder of the adapter, None for a full run.
    """

    checkpoint: Path
    settings: SftConfig
    base: ModelFolder
    adapter: Path | None


def open_tuned(
    ckpt_dir: Path, *, model: str | None = None, revision: str | None = None, hub: str | None = None
) -> Tuned:
    """Reads a checkpoint or the last one of a run.

    Args:
        ckpt_dir: run or checkpoint folder.
        model: base to use instead of the run's, e.g. where it lies elsewhere on this machine.
        revision: of that base.
        hub: of that base.

    Raises:
        UsageError: the folder, its settings or its base cannot be used.
    """
    checkpoint = find_checkpoint(ckpt_dir)
    settings = read_run_config(checkpoint)
    if not is_adapter(checkpoint):
        if model is not None:
            raise CheckpointError(
                f"holds a whole model; {model} cannot be its base",
                place=str(checkpoint),
                hint="leave --model out",
            )
        return Tuned(checkpoint, settings, describe(checkpoint), None)
    if model is not None:
        base = locate_model(model, revision=revision, hub=hub or "huggingface")
    else:
        base = locate_model(settings.model, revision=settings.revision, hub=settings.hub)
    return Tuned(checkpoint, settings, base, checkpoint)
