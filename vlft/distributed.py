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

    def broadcast(self, value: Value) -> Value:
        """The value of rank 0, on every rank."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        values = [value]
        broadcast_object_list(values)
        return values[0]

    def all_gather(self, value: Value) -> list[Value]:
        """The values of all ranks, by rank."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        found: list[Value] = gather_object([value])
        return found

    def on_rank_zero(self, work: Callable[[], None]) -> None:
        """Runs work on rank 0 while the other ranks wait.

        Raises:
            VlftError: on rank 0, if the work raised it. The other ranks exit with its code, so that
                none of them waits for a rank that is gone.
        """
        problem: VlftError | OSError | None = None
        if self.is_rank_zero:
            try:
                work()
            except (VlftError, OSError) as error:
                problem = error
        code = self.broadcast(None if problem is None else getattr(problem, "exit_code", 1))
        if problem is not None:
            raise problem
        if code is not None:
            raise SystemExit(code)

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
