"""Experiment trackers: TensorBoard and Weights & Biases, through Accelerate."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vlft.settings import to_json

if TYPE_CHECKING:
    from pathlib import Path

    from vlft.config import SftConfig


def start_trackers(accelerator: Any, config: SftConfig, run: Path) -> None:
    """Starts the tracker of --report-to with the run's settings and name, in the run folder."""
    if config.report_to == "none":
        return
    # Accelerate's tracker for TensorBoard takes no sequences.
    settings = {
        key: json.dumps(value) if isinstance(value, list | tuple) else value
        for key, value in to_json(config).items()
    }
    accelerator.project_configuration.logging_dir = str(run)
    wandb = {"name": f"{run.parent.name}/{run.name}", "dir": str(run)}
    accelerator.init_trackers("vlft", settings, {"wandb": wandb})
