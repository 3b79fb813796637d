"""A checkpoint of ``vlft sft`` -> its settings, base model and adapter."""

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
    """A checkpoint, the settings of its run, and its base."""

    checkpoint: Path
    settings: SftConfig
    base: ModelFolder  # for a full run the checkpoint itself
    adapter: Path | None  # the checkpoint; None for a full run


def open_tuned(
    ckpt_dir: Path, *, model: str | None = None, revision: str | None = None, hub: str | None = None
) -> Tuned:
    """The checkpoint of a folder, or the last one of a run.

    ``model``, with its revision and hub, replaces the run's base, e.g. because it has moved.

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
