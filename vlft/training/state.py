"""The state of a run besides its weights. Read back, the run goes on as if it had never stopped."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from vlft.checkpoints.weights import read_metadata
from vlft.console import warn
from vlft.errors import CheckpointError, shown
from vlft.files import open_tensors, read_object, save_tensors, write_whole
from vlft.schema import BOOL, OBJECT, Schema, number, whole
from vlft.training.plots import METRICS, parse_metrics
from vlft.training.position import Position
from vlft.training.progress import Window

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from vlft.training.backend import Backend

FILE, TENSORS = "state.json", "state.safetensors"
# Prefix of the moments in state.safetensors.
OPTIMIZER = "optimizer."
# What says where a scheduler is.
SCHEDULER = ("last_epoch", "base_lrs", "_last_lr")
STEPS = whole(0, 2**53)
SCHEMA: Schema = {
    **dict.fromkeys(("step", "best_step", "evaluated_step", "evaluations_without_best"), STEPS),
    **dict.fromkeys(("best_loss", "last_loss", "best_score", "last_score"), number(-1e30, 1e30)),
    **dict.fromkeys(("window", "scheduler", "scaler"), OBJECT),
    "finished": BOOL,
}


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
    save_tensors(tensors, target / TENSORS, {"tensors": str(len(tensors))})
    (target / FILE).write_text(json.dumps(asdict(state.position)), "utf-8")


def read_state(folder: Path, backend: Backend, *, new_course: bool = False) -> Position:
    """Restores optimiser, scheduler, scaler and random numbers; returns the position.

    A rank that the saved run did not have draws random numbers of its own.

    Args:
        folder: of the checkpoint.
        backend: with a new scheduler.
        new_course: whether the learning rate is that of the new scheduler after as many steps, and
            not the saved one.

    Raises:
        CheckpointError: the state is missing, damaged, or belongs to other parameters.
    """
    path = folder / "state"
    position = _read_position(path / FILE, backend)
    try:
        with open_tensors(path / TENSORS) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        stated = read_metadata(path / TENSORS).get("tensors", str(len(tensors)))
        if stated != str(len(tensors)):
            raise ValueError(f"{len(tensors)} tensors, {stated} were written")
        states = {name: tensors.pop(name) for name in list(tensors) if name.startswith("rng.")}
        _set_random_state(states, backend.world.rank, position.step)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise _unusable(path / TENSORS, str(error)) from None
    moments = {name.removeprefix(OPTIMIZER): value for name, value in tensors.items()}
    backend.load_moments(moments, shown(path / TENSORS))
    if new_course:
        position.scheduler.update(_rates_after(position.scheduler["last_epoch"], backend.scheduler))
    backend.scheduler.load_state_dict(position.scheduler)
    # The scheduler hands the rate to the optimiser only at its next step.
    rates = backend.scheduler.get_last_lr()
    for group, rate in zip(backend.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    if backend.accelerator.scaler is not None:
        backend.accelerator.scaler.load_state_dict(position.scaler)
    return position


def _rates_after(steps: int, scheduler: Any) -> dict[str, Any]:
    """What a new scheduler's state says of learning rates after this many steps."""
    schedule = getattr(scheduler, "scheduler", scheduler)  # Accelerate's wrapper has torch's.
    bases = list(schedule.base_lrs)
    rates = [base * share(steps) for base, share in zip(bases, schedule.lr_lambdas, strict=True)]
    return {"base_lrs": bases, "_last_lr": rates}


def _unusable(path: Path, found: str) -> CheckpointError:
    hint = "resume from another checkpoint of the run"
    return CheckpointError(f"no usable state: {found}", place=shown(path), hint=hint)


def _read_position(path: Path, backend: Backend) -> Position:
    """The position in state.json, its parts of the same types as those of a new run.

    Raises:
        CheckpointError: it is damaged, or belongs to another checkpoint.
    """
    fields = read_object(path, SCHEMA)
    try:
        position = Position(**fields)
    except TypeError as error:
        raise _unusable(path, str(error)) from None
    step = path.parent.parent.name.removeprefix("checkpoint-")
    if step.isdecimal() and int(step) != position.step:
        raise _unusable(path, f"it is of step {position.step}")
    scaler = backend.accelerator.scaler
    scheduler = backend.scheduler.state_dict()
    # Releases of torch differ in what else they keep.
    position.scheduler = {k: v for k, v in position.scheduler.items() if k in scheduler}
    needed = {k: v for k, v in scheduler.items() if k in position.scheduler or k in SCHEDULER}
    for name, saved, new in (
        ("scheduler", position.scheduler, needed),
        ("scaler", position.scaler, scaler.state_dict() if scaler is not None else {}),
        ("window", position.window, asdict(Window()) if position.window else {}),
    ):
        # Older releases saved no window.
        if not _is_like(saved, new):
            raise _unusable(path, f"{name} is not what vlft writes")
    return position


def _is_like(found: Any, model: Any) -> bool:
    """Whether two values of JSON have the same keys, lengths and types; numbers are one type."""
    if isinstance(model, dict):
        same = isinstance(found, dict) and found.keys() == model.keys()
        return same and all(_is_like(found[key], value) for key, value in model.items())
    if isinstance(model, list):
        same = isinstance(found, list) and len(found) == len(model)
        return same and all(map(_is_like, found, model))
    if isinstance(model, int | float) and not isinstance(model, bool):
        return isinstance(found, int | float) and math.isfinite(found)
    return type(found) is type(model)


def _set_random_state(states: Mapping[str, Tensor], rank: int, step: int) -> None:
    if rank > 0 and f"rng.{rank}.cpu" not in states:
        torch.manual_seed(1009 * step + rank)
        return
    torch.set_rng_state(states[f"rng.{rank}.cpu"])
    cuda = states.get(f"rng.{rank}.cuda")
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)


def cut_metrics(run: Path, step: int) -> None:
    """Drops the lines of metrics.jsonl that come after a step, and those that are damaged."""
    path = run / METRICS
    if path.exists() and not path.is_file():
        hint = "remove it; the run goes on without its curves"
        raise CheckpointError("not a regular file", place=shown(path), hint=hint)
    if path.is_file():
        lines = path.read_bytes().splitlines()
        rows = [parse_metrics(line) for line in lines]
        damaged = sum(row is None for row in rows[:-1])
        if damaged:
            warn(f"{shown(path)}: {damaged} damaged lines are left out")
        kept = [row for row in rows if row is not None and row["step"] <= step]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
