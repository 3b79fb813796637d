"""Opens a checkpoint of ``vlft sft``, or an adapter that another tool has written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlft.checkpoints.identity import BASE, is_other
from vlft.checkpoints.locate import ModelFolder, describe, locate_model
from vlft.checkpoints.runs import (
    ADAPTER_WEIGHTS,
    RUN_CONFIG,
    find_checkpoint,
    is_adapter,
    read_adapter_config,
    read_run_config,
    run_of,
)
from vlft.checkpoints.weights import merged_adapters, read_metadata
from vlft.config import SftConfig
from vlft.errors import CheckpointError, ConfigError, shown
from vlft.files import digest

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Tuned:
    """A checkpoint, the settings of its run, and its base.

    Attributes:
        checkpoint: its folder.
        settings: of its run; for an adapter of others, the defaults and its base.
        base: for a full run the checkpoint itself.
        adapter: the checkpoint; None for a full run.
        run: the run folder that contains the checkpoint; None if there is none.
    """

    checkpoint: Path
    settings: SftConfig
    base: ModelFolder
    adapter: Path | None
    run: Path | None

    @property
    def settings_file(self) -> Path:
        """The file of the settings; an adapter of others has none."""
        return self.checkpoint / RUN_CONFIG


def open_tuned(
    ckpt_dir: Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    hub: str | None = None,
    accept_changes: bool = False,
) -> Tuned:
    """The checkpoint of a folder, the last one of a run, or an adapter of others.

    ``model``, with its revision and hub, replaces the adapter's own base, e.g. because it has
    moved. Other weights than those of the adapter's training are refused unless accepted.

    Raises:
        UsageError: the folder, its settings or its base cannot be used.
    """
    checkpoint = find_checkpoint(ckpt_dir, anywhere=True)
    is_ours = (checkpoint / RUN_CONFIG).is_file()
    settings = read_run_config(checkpoint) if is_ours else _foreign(checkpoint, model)
    run = run_of(checkpoint)
    if not is_adapter(checkpoint):
        if model is not None:
            raise CheckpointError(
                f"holds a whole model; {model} cannot be its base",
                place=str(checkpoint),
                hint="leave --model out",
            )
        return Tuned(checkpoint, settings, describe(checkpoint), None, run)
    if model is not None:
        base = locate_model(model, revision=revision, hub=hub or "huggingface")
    else:
        base = locate_model(settings.model, revision=settings.revision, hub=settings.hub)
    problem = other_base(checkpoint, base)
    if problem and not accept_changes:
        raise problem
    return Tuned(checkpoint, settings, base, checkpoint, run)


def other_base(adapter: Path, base: ModelFolder) -> CheckpointError | None:
    """The error if the base is not that of the training; None if it is or nothing is recorded."""
    weights = adapter / ADAPTER_WEIGHTS
    found = ""
    if weights.is_file() and digest(weights) in merged_adapters(base.path):
        found, hint = "holds this adapter already", "use the model as it is, without the adapter"
    elif is_other(read_metadata(weights).get(BASE, ""), base.weights_digest):
        of = f"the adapter was trained on, by {shown(weights)}"
        found, hint = f"its weights are not those that {of}", "use those"
    if not found:
        return None
    hint += ", or add --accept-changes to use it all the same"
    return CheckpointError(found, place=shown(base.path), hint=hint)


def _foreign(adapter: Path, model: str | None) -> SftConfig:
    """Settings of an adapter that was not made by vlft; only its base model is known.

    Raises:
        ConfigError: neither the adapter nor the user names a base model.
    """
    base = read_adapter_config(adapter).get("base_model_name_or_path")
    if model is None and not base:
        hint = "name the model that it was trained on"
        raise ConfigError(f"{shown(adapter)} does not name its base", place="--model", hint=hint)
    return SftConfig(model=model or base)
