"""Experiment trackers: TensorBoard and Weights & Biases, through Accelerate."""

from __future__ import annotations

import json
import os
import secrets
from typing import TYPE_CHECKING, Any

from vlft.settings import to_json

if TYPE_CHECKING:
    from pathlib import Path

    from vlft.config import SftConfig


def start_trackers(accelerator: Any, config: SftConfig, run: Path, step: int) -> None:
    """Starts the tracker of --report-to with the run's settings and name, in the run folder.

    A run that is resumed after a step goes on in the tracker's record of the run, from which
    TensorBoard drops the steps after that one.
    """
    if config.report_to == "none":
        return
    # Accelerate's tracker for TensorBoard takes no sequences.
    settings = {
        key: json.dumps(value) if isinstance(value, list | tuple) else value
        for key, value in to_json(config).items()
    }
    accelerator.project_configuration.logging_dir = str(run)
    project = "vlft"
    resumed = {"purge_step": step + 1} if step > 0 else {}
    arguments: dict[str, dict[str, Any]] = {"tensorboard": resumed}
    if config.report_to == "wandb":
        arguments["wandb"] = {
            "name": f"{run.parent.name}/{run.name}",
            "dir": str(run),
            "id": _wandb_id(run, writes=accelerator.is_main_process),
            "resume": "allow",
        }
        # wandb's own variable decides where its metrics go; it changes no result.
        project = os.environ.get("WANDB_PROJECT") or project
    accelerator.init_trackers(project, settings, arguments)


def _wandb_id(run: Path, *, writes: bool) -> str:
    """The id of the run at wandb, kept in the run folder for when it is resumed."""
    path = run / "wandb_id"
    if path.is_file():
        return path.read_text("utf-8").strip()
    made = secrets.token_hex(4)
    if writes:
        path.write_text(made + "\n", "utf-8")
    return made
