"""What a run writes: checkpoints that are whole or absent, and the curves."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlft.checkpoints.adapter import adapter_tensors, save_adapter
from vlft.checkpoints.export import export_model
from vlft.checkpoints.runs import point, save_checkpoint, write_run_config
from vlft.families.image_settings import ImageSettings, state_image_settings
from vlft.settings import to_json
from vlft.training.plots import plot_run
from vlft.training.state import State, random_states, write_state

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from vlft.checkpoints.locate import ModelFolder
    from vlft.config import SftConfig
    from vlft.training.backend import Backend
    from vlft.training.model import TunedModel
    from vlft.training.position import Position


@dataclass(frozen=True)
class Snapshot:
    """What rank 0 needs to write a checkpoint.

    Attributes:
        adapter: the adapter's weights; empty for full tuning.
        state: optimiser, random numbers, position.
    """

    adapter: dict[str, Tensor]
    state: State


# Seconds between two drawings of the curves: they may take as long as the rest of a save.
REDRAW = 30.0


@dataclass
class Checkpointer:
    """Writes the checkpoints of a run.

    Attributes:
        run: the run folder.
        config: saved with every checkpoint.
        folder: of the base model.
        model: what trains.
        backend: has the optimiser.
    """

    run: Path
    config: SftConfig
    folder: ModelFolder
    model: TunedModel
    backend: Backend
    _drawn: float = field(default_factory=time.monotonic)

    def save(self, position: Position) -> None:
        """Writes a checkpoint of this position; all ranks must call it."""
        snapshot = self.collect(position)
        self.backend.world.on_rank_zero(lambda: self.write(snapshot))

    def mark_best(self, step: int) -> None:
        """Has ``best`` name an existing checkpoint; all ranks must call it."""
        self.backend.world.on_rank_zero(lambda: point(self.run / "best", f"checkpoint-{step}"))

    def collect(self, position: Position) -> Snapshot:
        """Gathers what a checkpoint holds; a collective call."""
        backend = self.backend
        position.scheduler = dict(backend.scheduler.state_dict())
        scaler = backend.accelerator.scaler
        position.scaler = dict(scaler.state_dict()) if scaler is not None else {}
        state = State(position, backend.world.all_gather(random_states()), backend.moments())
        with backend.gathered_weights():
            adapter = adapter_tensors(self.model.peft) if self.config.tuner == "lora" else {}
        return Snapshot(adapter, state)

    def write(self, snapshot: Snapshot) -> None:
        """Writes a checkpoint and, every REDRAW seconds, the curves; on rank 0 alone."""
        position = snapshot.state.position

        def write_files(target: Path) -> None:
            self._write_weights(target, snapshot)
            write_run_config(target, to_json(self.config))
            write_state(target, snapshot.state)

        save_checkpoint(
            self.run,
            position.step,
            write_files,
            keep=self.config.save_total_limit,
            best_step=position.best_step,
        )
        if time.monotonic() - self._drawn >= REDRAW:
            plot_run(self.run)
            self._drawn = time.monotonic()

    def _write_weights(self, target: Path, snapshot: Snapshot) -> None:
        if self.config.tuner == "lora":
            peft: Any = self.model.peft
            save_adapter(peft, target, snapshot.adapter, self.folder.weights_digest)
            return
        layout = self.folder.layout
        export_model(self.model.module, self.folder, target, layout=layout, dtype=None)
        state_image_settings(target, ImageSettings.of(self.config), self.folder.processor())
