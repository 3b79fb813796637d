"""Where a run is: read back, it goes on as if it had never stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlft.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

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


def write_state(
    folder: Path, position: Position, optimizer: torch.optim.Optimizer, model: nn.Module
) -> None:
    """Writes ``state/``: optimiser, random numbers, position. Plain tensors and JSON."""
    target = folder / "state"
    target.mkdir()
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            tensors[f"optimizer.{names[id(parameter)]}:{key}"] = value.detach().cpu().contiguous()
    save_file(tensors, target / "state.safetensors")
    (target / "state.json").write_text(json.dumps(asdict(position)), "utf-8")


def read_state(folder: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> Position:
    """Puts optimiser and random numbers back; returns the position.

    Raises:
        CheckpointError: the state is missing or belongs to other parameters.
    """
    path = folder / "state"
    try:
        position = Position(**json.loads((path / "state.json").read_text("utf-8")))
        tensors = load_file(path / "state.safetensors")
        torch.set_rng_state(tensors.pop("rng.cpu"))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"no usable state to resume from: {error}",
            place=str(path),
            hint="resume from another checkpoint of the run",
        ) from None
    cuda = tensors.pop("rng.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    _fill_optimizer(optimizer, model, tensors, path)
    return position


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
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor], path: Path
) -> None:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, value in tensors.items():
        owner, _, key = name.removeprefix("optimizer.").rpartition(":")
        if owner not in parameters:
            raise CheckpointError(f"holds {owner}, which does not train here", place=str(path))
        parameter = parameters[owner]
        # AdamW keeps its step count on the CPU.
        device = "cpu" if key == "step" else parameter.device
        optimizer.state[parameter][key] = value.to(device)
