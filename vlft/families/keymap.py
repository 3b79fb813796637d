"""Tensor names of the authors' layout <-> those of transformers' class.

authors' file            rule        transformers' module
blocks.3.attn.qkv.bias   split       layers.3.self_attn.{q,k,v}_proj.bias
pos_embed [1, n, W]      squeeze     embeddings.position_embedding.weight [n, W]
norm.weight              rename      post_layernorm.weight
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vlft.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

Change = Literal["rename", "split", "squeeze"]


@dataclass(frozen=True)
class KeyRule:
    """One line of the table.

    In names ``{i}`` stands for a number, ``{p}`` for weight or bias, ``{leaf}`` for one word and
    ``{rest}`` for anything.

    Attributes:
        original: name in the authors' layout.
        native: name or names in transformers' class.
        change: rename; split: the original's rows are the natives' stacked; squeeze: the original
            has a leading axis of 1.
    """

    original: str
    native: tuple[str, ...]
    change: Change = "rename"


@dataclass(frozen=True)
class Match:
    """How one original tensor and its native ones correspond."""

    original: str
    native: tuple[str, ...]
    change: Change

    def to_native(self, tensor: Tensor) -> list[Tensor]:
        """The native tensors of an original one."""
        if self.change == "split":
            return list(tensor.chunk(len(self.native)))
        return [tensor.squeeze(0) if self.change == "squeeze" else tensor]

    def to_original(self, tensors: Sequence[Tensor]) -> Tensor:
        """The original tensor of its native ones, in the order of ``native``."""
        import torch

        if self.change == "split":
            return torch.cat(list(tensors))
        return tensors[0].unsqueeze(0) if self.change == "squeeze" else tensors[0]


class KeyMap:
    """The table of a family, read in both directions.

    Args:
        rules: the first that fits decides.
        unused: patterns of original names that no module uses; they are carried over on export.
    """

    def __init__(self, rules: Iterable[KeyRule], unused: Iterable[str] = ()) -> None:
        self._rules = tuple(rules)
        self._from_original = [(_compile(rule.original), rule) for rule in self._rules]
        self._from_native = [(_compile(name), rule) for rule in self._rules for name in rule.native]
        self._unused = [_compile(name) for name in unused]

    def is_unused(self, original: str) -> bool:
        """Whether the tensor belongs to the checkpoint but to no module."""
        return any(pattern.fullmatch(original) for pattern in self._unused)

    def from_original(self, name: str) -> Match | None:
        """The correspondence that an original name belongs to."""
        return _first(self._from_original, name)

    def from_native(self, name: str) -> Match:
        """The correspondence that a native name belongs to.

        Raises:
            CheckpointError: the table has no line for it.
        """
        match = _first(self._from_native, name)
        if match is None:
            raise CheckpointError("has no name in the authors' layout", place=name)
        return match


def _first(table: list[tuple[re.Pattern[str], KeyRule]], name: str) -> Match | None:
    for pattern, rule in table:
        found = pattern.fullmatch(name)
        if found:
            values = found.groupdict()
            natives = tuple(native.format(**values) for native in rule.native)
            return Match(rule.original.format(**values), natives, rule.change)
    return None


def _compile(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for name, kind in (("i", r"\d+"), ("p", "weight|bias"), ("leaf", r"\w+"), ("rest", ".+")):
        pattern = pattern.replace(re.escape("{" + name + "}"), f"(?P<{name}>{kind})")
    return re.compile(pattern)
