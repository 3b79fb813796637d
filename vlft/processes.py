"""One run in several processes: what each knows of itself and asks of the others.

``accelerate launch`` starts them; all read the same settings and data, run their rows of every
step, and agree on sums. Only the first writes.
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
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        index: of this one; the first is 0.
        count: how many there are.
        sharded: whether each holds only a part of what trains, or of its moments.
        zero: DeepSpeed's stage; 0 without it.
    """

    index: int = 0
    count: int = 1
    sharded: bool = False
    zero: int = 0

    @property
    def divides_weights(self) -> bool:
        """Whether each holds only a part of every weight."""
        return self.sharded and self.zero != 2

    @property
    def is_first(self) -> bool:
        """Whether this one writes."""
        return self.index == 0

    def wait(self) -> None:
        """Returns when all are here."""
        if self.count > 1:
            from accelerate.utils import wait_for_everyone

            wait_for_everyone()

    def same(self, value: Value) -> Value:
        """What the first has."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        values = [value]
        broadcast_object_list(values)
        return values[0]

    def all(self, value: Value) -> list[Value]:
        """What each has, in their order."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        found: list[Value] = gather_object([value])
        return found

    def first_does(self, work: Callable[[], None]) -> None:
        """Work of the first, for which the others wait; its error ends them too."""
        problem: VlftError | None = None
        if self.is_first:
            try:
                work()
            except VlftError as error:
                problem = error
        code = self.same(None if problem is None else problem.exit_code)
        if problem is not None:
            raise problem
        if code is not None:
            raise SystemExit(code)

    def sum(self, *values: float) -> tuple[float, ...]:
        """Sums over all, the same numbers in each."""
        if self.count == 1:
            return values
        import torch
        from accelerate import PartialState
        from accelerate.utils import reduce

        state: Any = PartialState()
        device = state.device
        found = reduce(torch.tensor(values, dtype=torch.float64, device=device), reduction="sum")
        return tuple(found.tolist())


ALONE = Processes()


def whole(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; if each process holds a part, all must ask."""
    full = getattr(tensor, "full_tensor", None)
    found: Tensor = full() if full is not None else tensor
    return found.detach().cpu().contiguous()


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor where another is: on its device, or this process's part if that is sharded."""
    placed = tensor.to(like.device)
    if not hasattr(like, "full_tensor"):
        return placed
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(placed, sharded.device_mesh, sharded.placements)
