"""The state of a run besides its weights. Read back, the run goes on as if it had never stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vlft.errors import CheckpointError
from vlft.files import save_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from vlft.training.backend import Backend

METRICS = "metrics.jsonl"
# Prefix of the moments in state.safetensors.
OPTIMIZER = "optimizer."


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        best_loss: lowest validation loss so far, in nats per token.
        best_step: the step at which it was measured.
        evaluations_without_best: evaluations since then.
        last_loss: validation loss of the last evaluation.
        evaluated_step: the step at which it was measured.
        finished: whether the run ends here.
        window: what progress.Window has summed up since the last log line.
        scheduler: state of the learning rate scheduler.
        scaler: state of the gradient scaler; empty without one.
    """

    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_best: int = 0
    last_loss: float | None = None
    evaluated_step: int | None = None
    finished: bool = False
    window: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def random_states() -> dict[str, Tensor]:
    """The states of this process's generators of random numbers, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


@dataclass(frozen=True)
class State:
    """All that a resumed run needs besides the weights.

    Attributes:
        position: of the run.
        randoms: random_states of each rank.
        moments: of the optimiser, see Backend.moments.
    """

    position: Position
    randoms: Sequence[Mapping[str, Tensor]]
    moments: Mapping[str, Tensor]


def write_state(folder: Path, state: State) -> None:
    """Writes ``state/`` into a checkpoint folder: plain tensors and JSON."""
    target = folder / "state"
    target.mkdir()
    tensors = {f"{OPTIMIZER}{name}": tensor for name, tensor in state.moments.items()}
    for rank, states in enumerate(state.randoms):
        tensors.update({f"rng.{rank}.{device}": value for device, value in states.items()})
    save_tensors(tensors, target / "state.safetensors")
    (target / "state.json").write_text(json.dumps(asdict(state.position)), "utf-8")


def read_state(folder: Path, backend: Backend) -> Position:
    """Restores optimiser, scheduler, scaler and random numbers; returns the position.

    A rank that the saved run did not have draws random numbers of its own.

    Raises:
        CheckpointError: the state is missing or belongs to other parameters.
    """
    path = folder / "state"
    try:
        position = Position(**json.loads((path / "state.json").read_text("utf-8")))
        tensors = load_file(path / "state.safetensors")
        states = {name: tensors.pop(name) for name in list(tensors) if name.startswith("rng.")}
        _set_random_state(states, backend.world.rank, position.step)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"no usable state to resume from: {error}",
            place=str(path),
            hint="resume from another checkpoint of the run",
        ) from None
    moments = {name.removeprefix(OPTIMIZER): value for name, value in tensors.items()}
    backend.load_moments(moments, str(path))
    backend.scheduler.load_state_dict(position.scheduler)
    # The scheduler hands the rate to the optimiser only at its next step.
    rates = backend.scheduler.get_last_lr()
    for group, rate in zip(backend.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    if backend.accelerator.scaler is not None:
        backend.accelerator.scaler.load_state_dict(position.scaler)
    return position


def _set_random_state(states: Mapping[str, Tensor], rank: int, step: int) -> None:
    if rank > 0 and f"rng.{rank}.cpu" not in states:
        torch.manual_seed(1009 * step + rank)
        return
    torch.set_rng_state(states[f"rng.{rank}.cpu"])
    cuda = states.get(f"rng.{rank}.cuda")
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)


def cut_metrics(run: Path, step: int) -> None:
    """Drops the lines of metrics.jsonl that come after a step."""
    path = run / METRICS
    if path.exists():
        lines = path.read_text("utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        part = path.with_suffix(".part")
        part.write_text("".join(line + "\n" for line in kept), "utf-8")
        part.replace(path)


def _step_of(line: str) -> float:
    """The step of a metrics line; infinite if the line was cut off by a kill."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")
