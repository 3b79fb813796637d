"""The engine of a run: gradients, the optimiser step, and what a checkpoint takes from both.

    Backend             one process, DDP, FSDP2      this file
    DeepSpeedBackend    ZeRO-2, ZeRO-3               training/deepspeed.py

The loop, the autotuner and the checkpointer call these methods and never ask which one it is.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlft.distributed import full_tensor, shard_like
from vlft.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from vlft.distributed import World
    from vlft.training.loss import PackedLoss
    from vlft.vision.cache_plan import CachePlan

# What AdamW keeps of a parameter.
STATE = ("step", "exp_avg", "exp_avg_sq")


class Backend:
    """Gradients and steps through Accelerate.

    Args:
        accelerator: Accelerate's: device, mixed precision, gradient scaling, trackers.
        world: the ranks of the run.
        max_grad_norm: gradients are clipped to this norm; 0 disables clipping.

    Attributes:
        objective: the PackedLoss, wrapped for several ranks if there are any.
        loss: the PackedLoss itself.
        model: the module whose parameters train.
        optimizer: wrapped by Accelerate.
        scheduler: of the learning rate, wrapped by Accelerate.
    """

    def __init__(self, accelerator: Any, world: World, max_grad_norm: float) -> None:
        self.accelerator = accelerator
        self.world = world
        self.max_grad_norm = max_grad_norm
        self.objective: nn.Module
        self.loss: PackedLoss
        self.model: nn.Module
        self.optimizer: torch.optim.Optimizer
        self.scheduler: Any

    @property
    def device(self) -> torch.device:
        """Where rows and images go."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def scales_gradients(self) -> bool:
        """Whether a scaler skips steps whose gradients are not finite (float16)."""
        return self.accelerator.scaler is not None

    def check_cache(self, plan: CachePlan) -> None:
        """Raises ConfigError if this backend cannot train with such a vision cache."""

    def prepare(self, loss: PackedLoss, optimizer: Any, scheduler: Any) -> None:
        """Takes over what trains. FSDP2 and DDP wrap it."""
        self.loss, self.model = loss, loss.model
        self.objective, self.optimizer, self.scheduler = self.accelerator.prepare(
            loss, optimizer, scheduler
        )

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """The context of a row's forward and backward pass.

        Args:
            last: whether an optimiser step follows. Gradients are all-reduced only then.
        """
        if last:
            return nullcontext()
        context: AbstractContextManager[None] = self.accelerator.no_sync(self.objective)
        return context

    def backward(self, loss: Tensor, *, last: bool) -> None:  # noqa: ARG002
        """Adds the gradients of a scalar loss.

        Args:
            loss: already normalised.
            last: as for ``accumulate``.
        """
        self.accelerator.backward(loss)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        self.optimizer.zero_grad()

    def step(self) -> float:
        """Clips, updates the weights and the learning rate; returns the norm before clipping.

        With a norm that is not finite weights and rate stay as they are, unless a gradient scaler
        is there, which then lowers its scale.
        """
        limit = self.max_grad_norm or math.inf
        # All parameters of the objective: Accelerate finds out by them which model is meant.
        norm = float(self.accelerator.clip_grad_norm_(self.objective.parameters(), limit))
        if math.isfinite(norm) or self.scales_gradients:
            self.optimizer.step()
            self.scheduler.step()
        return norm

    def try_gradients(self, loss: Callable[[], Tensor]) -> None:
        """Forward and backward pass next to the gradients and moments of a later step.

        It shows whether a row fits into memory and leaves nothing behind.

        Args:
            loss: makes the loss of the row.
        """
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # Of sharded weights each rank holds a part; a resumed run has its moments already.
        sizes = [getattr(p, "_local_tensor", p).numel() for p in trained]
        missing = 0 if self.optimizer.state else 2 * sum(sizes)
        moments = torch.empty(missing, dtype=torch.float32, device=self.device)
        try:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            # Each rank tries on its own, unless all of them hold one model together.
            with self.accumulate(last=self.world.sharded):
                self.backward(loss(), last=self.world.sharded)
        finally:
            del moments
            self.zero_grad()

    def gathered_weights(self) -> AbstractContextManager[None]:
        """A context in which every trained weight is whole on each rank; a collective call."""
        return nullcontext()

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's state by parameter and name, whole, on the CPU; a collective call."""
        if not (self.world.is_rank_zero or self.world.sharded):
            return {}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {
            f"{names[id(parameter)]}:{key}": full_tensor(value)
            for parameter, values in self.optimizer.state.items()
            for key, value in values.items()
        }

    def load_moments(self, moments: Mapping[str, Tensor], place: str) -> None:
        """Puts back what ``moments`` returned.

        Args:
            moments: of a saved run, of any number of ranks.
            place: for messages.

        Raises:
            CheckpointError: they belong to parameters that do not train here, or of other shapes.
        """
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        hint = "resume from another checkpoint of the run"
        for name, value in moments.items():
            owner, _, key = name.rpartition(":")
            if owner not in parameters:
                found = f"holds {owner}, which does not train here"
                raise CheckpointError(found, place=place, hint=hint)
            # ZeRO-3 leaves an empty tensor in the place of a shard.
            whole = getattr(parameters[owner], "ds_shape", parameters[owner].shape)
            shape = () if key == "step" else tuple(whole)
            lacks = [one for one in STATE if f"{owner}:{one}" not in moments]
            found = f"{name} is {tuple(value.shape)}, not {shape}"
            if key not in STATE or lacks:
                found = f"of {owner} found {key}, allowed are {', '.join(STATE)} together"
            if key not in STATE or lacks or tuple(value.shape) != shape:
                raise CheckpointError(found, place=place, hint=hint)
            self._put_moment(parameters[owner], key, value)

    def _put_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        # AdamW keeps its step count on the CPU.
        placed = value if key == "step" else shard_like(value, parameter)
        self.optimizer.state[parameter][key] = placed
