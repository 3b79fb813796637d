"""Several adapters of one base, of which one is in place at a time; the base is loaded once.

peft puts layers of an adapter in the place of the base's, and load_adapter() new tensors in the
place of those that were trained fully. Both are noted here and taken back, whatever kind of adapter
it is; what is in place afterwards is the base again, bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlft.checkpoints.adapter import load_adapter
from vlft.checkpoints.runs import read_adapter_config
from vlft.errors import CheckpointError, shown

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

# Starts of LoRA that subtract it from the base's weights when an adapter is loaded.
CHANGES_BASE = ("olora", "pissa")
# What peft leaves on a model that it has put an adapter into.
MARK = "peft_config"


def keeps_base(folder: Path) -> bool:
    """Whether an adapter leaves the base's weights as they are."""
    start = read_adapter_config(folder).get("init_lora_weights")
    return not (isinstance(start, str) and start.startswith(CHANGES_BASE))


@dataclass(frozen=True)
class _Change:
    """What an adapter has in another way than the base.

    Attributes:
        model: peft's, around the base.
        modules: (module, name of its child, the base's child, the adapter's).
        tensors: (parameter, the base's values, the adapter's).
    """

    model: Any
    modules: tuple[tuple[nn.Module, str, nn.Module | None, nn.Module | None], ...]
    tensors: tuple[tuple[nn.Parameter, Tensor, Tensor], ...]


class Adapters:
    """A base, and adapters that are put into it by their names.

    Args:
        base: of ``load_model``.
    """

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._changes: dict[str, _Change] = {}
        self._placed: str | None = None

    def add(self, name: str, folder: Path) -> None:
        """Loads an adapter, which is not in place afterwards.

        Raises:
            CheckpointError: it cannot be loaded, or changes the base's weights.
        """
        if not keeps_base(folder):
            start = read_adapter_config(folder).get("init_lora_weights")
            raise CheckpointError(
                f"the adapter started with {start}, which changes the base that others share",
                place=shown(folder),
                hint=f"merge it first: vlft merge-lora --ckpt-dir {shown(folder)}, then --model",
            )
        self.use(None)
        modules = [
            (module, child, old)
            for module in self._base.modules()
            for child, old in module._modules.items()
        ]
        tensors = [(parameter, parameter.data) for parameter in self._base.parameters()]
        model = load_adapter(self._base, folder)
        self._changes[name] = _Change(
            model,
            tuple(
                (module, child, old, new)
                for module, child, old in modules
                if (new := module._modules[child]) is not old
            ),
            tuple(
                (parameter, old, parameter.data)
                for parameter, old in tensors
                if parameter.data_ptr() != old.data_ptr()
            ),
        )
        self._placed = name
        self.use(None)

    def use(self, name: str | None) -> Any:
        """The model with the adapter of a name in place; without any for None."""
        if self._placed is not None and self._placed != name:
            change = self._changes[self._placed]
            for module, child, old, _ in change.modules:
                module._modules[child] = old
            for parameter, values, _ in change.tensors:
                parameter.data = values
            delattr(self._base, MARK)
            self._placed = None
        if name is None:
            return self._base
        change = self._changes[name]
        if self._placed is None:
            for module, child, _, new in change.modules:
                module._modules[child] = new
            for parameter, _, values in change.tensors:
                parameter.data = values
            setattr(self._base, MARK, change.model.peft_config)
            self._placed = name
        return change.model
