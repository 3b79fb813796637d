"""Where a run is: read back, it goes on as if it had never stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlft.distributed import SINGLE, full_tensor, shard_like
from vlft.errors import CheckpointError
from vlft.training import zero

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from vlft.distributed import World

METRICS = "metrics.jsonl"


@dataclass
class Position:
    """Where a run is; all that its future depends on besides tensors.

    Attributes:
        step: optimiser steps done.
        best_loss: lowest validation loss so far, in nats per token.
        best_step: where it was.
        evaluations_without_best: since then.
        finished: whether the run was to end here.
    """

    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_best: int = 0
    finished: bool = False
    scheduler: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def random_states() -> dict[str, Tensor]:
    """The states of this process's generators of random numbers, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, world: World
) -> dict[str, Tensor]:
    """The optimiser's moments by parameter; of a sharded model, all processes must ask."""
    if world.zero_stage:
        found = zero.moments_of(optimizer, model)
        return {f"optimizer.{name}:{key}": value for name, key, value in found}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"optimizer.{names[id(parameter)]}:{key}": full_tensor(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def write_state(
    folder: Path,
    position: Position,
    randoms: Sequence[Mapping[str, Tensor]],
    moments: Mapping[str, Tensor],
) -> None:
    """Writes ``state/``: optimiser, random numbers, position. Plain tensors and JSON.

    Args:
        folder: of the checkpoint.
        position: of the run.
        randoms: random_states of each process.
        moments: optimizer_tensors.
    """
    target = folder / "state"
    target.mkdir()
    tensors = {
        f"rng.{index}.{device}": state
        for index, states in enumerate(randoms)
        for device, state in states.items()
    }
    save_file({**tensors, **moments}, target / "state.safetensors")
    (target / "state.json").write_text(json.dumps(asdict(position)), "utf-8")


def read_state(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    world: World = SINGLE,
) -> Position:
    """Puts optimiser and random numbers back; returns the position.

    A process that the saved run did not have draws random numbers of its own.

    Raises:
        CheckpointError: the state is missing or belongs to other parameters.
    """
    path = folder / "state"
    try:
        position = Position(**json.loads((path / "state.json").read_text("utf-8")))
        tensors = load_file(path / "state.safetensors")
        states = {name: tensors.pop(name) for name in list(tensors) if name.startswith("rng.")}
        _set_random_state(states, world.rank, position.step)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"no usable state to resume from: {error}",
            place=str(path),
            hint="resume from another checkpoint of the run",
        ) from None
    _fill_optimizer(optimizer, model, tensors, path, world)
    return position


def _set_random_state(states: Mapping[str, Tensor], process: int, step: int) -> None:
    if process > 0 and f"rng.{process}.cpu" not in states:
        torch.manual_seed(1009 * step + process)
        return
    torch.set_rng_state(states[f"rng.{process}.cpu"])
    cuda = states.get(f"rng.{process}.cuda")
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


def _fill_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: dict[str, Tensor],
    path: Path,
    world: World,
) -> None:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, value in tensors.items():
        owner, _, key = name.removeprefix("optimizer.").rpartition(":")
        if owner not in parameters:
            raise CheckpointError(f"holds {owner}, which does not train here", place=str(path))
        parameter = parameters[owner]
        if world.zero_stage:
            zero.put_moment(optimizer, parameter, key, value)
            continue
        # AdamW keeps its step count on the CPU.
        optimizer.state[parameter][key] = value if key == "step" else shard_like(value, parameter)
