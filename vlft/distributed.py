"""Ranks of one run, and the collective operations between them.

``accelerate launch`` or ``torchrun`` starts the processes. Every rank reads the same settings and
data, runs its share of the rows of each step, and the ranks agree on sums. Only rank 0 writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from vlft.errors import VlftError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """The ranks of a run, seen from one of them.

    Attributes:
        rank: of this process.
        size: the world size.
        sharded: whether each rank holds only a shard of the trained weights or of their moments.
        shards_weights: whether each rank holds only a shard of every weight (FSDP2, ZeRO-3).
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False
    shards_weights: bool = False

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank writes the files of the run."""
        return self.rank == 0

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        if self.size > 1:
            from accelerate.utils import wait_for_everyone

            wait_for_everyone()

    def all_gather(self, value: Value) -> list[Value]:
        """The values of all ranks, by rank."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        found: list[Value] = gather_object([value])
        return found

    def on_rank_zero(self, work: Callable[[], Value]) -> Value:
        """What work returns on rank 0, on every rank. It raises errors as ``together`` does."""

        def own_work() -> Value | None:
            return work() if self.is_rank_zero else None

        found: Value = self.together(own_work)[0]
        return found

    def together(self, work: Callable[[], Value]) -> list[Any]:
        """Runs work on every rank; returns what it returned, by rank, once all are done.

        Raises:
            VlftError: on rank 0, if the work raised it anywhere; so too OSError. See ``end_if``.
        """
        value: Any = None
        problem: VlftError | OSError | None = None
        try:
            value = work()
        except (VlftError, OSError) as error:
            problem = error
        self.end_if(problem)
        return self.all_gather(value)

    def end_if(self, problem: VlftError | OSError | None) -> None:
        """Ends the run on all ranks if any has a problem, so that none waits for one that is gone.

        Raises:
            VlftError: the first problem, on rank 0; so too OSError. The other ranks exit with its
                code, so that there is one message.
        """
        found = [error for error in self.all_gather(problem) if error is not None]
        if found and self.is_rank_zero:
            raise problem or found[0]
        if found:
            raise SystemExit(getattr(found[0], "exit_code", 1))

    def all_reduce(self, *values: float) -> tuple[float, ...]:
        """Sums over the ranks in float64, equal on all of them."""
        if self.size == 1:
            return values
        import torch
        from accelerate import PartialState
        from accelerate.utils import reduce

        state: Any = PartialState()
        device = state.device
        found = reduce(torch.tensor(values, dtype=torch.float64, device=device), reduction="sum")
        return tuple(found.tolist())


SINGLE = World()


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU; a collective call if the tensor is sharded."""
    gather = getattr(tensor, "full_tensor", None)
    found: Tensor = gather() if gather is not None else tensor
    return found.detach().cpu().contiguous()


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor on the device of another, and sharded as that one is."""
    placed = tensor.to(like.device)
    if not hasattr(like, "full_tensor"):
        return placed
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(placed, sharded.device_mesh, sharded.placements)
