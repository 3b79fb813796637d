"""Tensor names of the authors' layout <-> those of the model's class.

authors' file             rule        module
blocks.3.attn.qkv.bias    split       layers.3.self_attn.{q,k,v}_proj.bias
pos_embed [1, n, W]       squeeze     embeddings.position_embedding.weight [n, W]
norm.weight               rename      post_layernorm.weight
experts.5.up_proj [I, D]  stack       experts.gate_up_proj [E, 2I, D], the second half of [5]
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vlft.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

Change = Literal["rename", "split", "squeeze", "stack"]


@dataclass(frozen=True)
class KeyRule:
    """One line of the table.

    In names ``{i}`` and ``{e}`` stand for numbers, ``{p}`` for weight or bias, ``{leaf}`` for one
    word and ``{rest}`` for anything.

    Attributes:
        original: name in the authors' layout.
        native: name or names in the model's class.
        change: rename; split: the original's rows are the natives' stacked; squeeze: the original
            has a leading axis of 1; stack: the native holds many originals, number ``{e}`` of the
            name at index e of its first axis.
        part: (index, count) of the stretch of rows there that the original is, for stack.
    """

    original: str
    native: tuple[str, ...]
    change: Change = "rename"
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Match:
    """How one original tensor and its native ones correspond.

    Attributes:
        original: name.
        native: names.
        change: see KeyRule.
        index: place in the native's first axis, for stack.
        part: see KeyRule.
    """

    original: str
    native: tuple[str, ...]
    change: Change
    index: int = 0
    part: tuple[int, int] = (0, 1)

    def to_native(self, tensor: Tensor) -> list[Tensor]:
        """The native tensors of an original one; not for stack, which needs all of them."""
        if self.change == "split":
            return list(tensor.chunk(len(self.native)))
        return [tensor.squeeze(0) if self.change == "squeeze" else tensor]

    def to_original(self, tensors: Sequence[Tensor]) -> Tensor:
        """The original tensor of its native ones, in the order of ``native``."""
        import torch

        if self.change == "split":
            return torch.cat(list(tensors))
        if self.change == "stack":
            return self.place_in(tensors[0])
        return tensors[0].unsqueeze(0) if self.change == "squeeze" else tensors[0]

    def place_in(self, stacked: Tensor) -> Tensor:
        """The stretch of a stacked native tensor (E, rows, columns) that the original is: a view.

        Raises:
            IndexError: the native tensor has no such index.
        """
        place, count = self.part
        rows = stacked.shape[1] // count
        return stacked[self.index, place * rows : (place + 1) * rows]


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
        for pattern, rule in self._from_original:
            found = pattern.fullmatch(name)
            if found:
                return _match(rule, found.groupdict())
        return None

    def from_native(self, name: str, stacked: int = 1) -> list[Match]:
        """The correspondences that a native name belongs to; several only for stack.

        Args:
            name: native.
            stacked: length of the tensor's first axis.

        Raises:
            CheckpointError: the table has no line for it.
        """
        matches: list[Match] = []
        for pattern, rule in self._from_native:
            found = pattern.fullmatch(name)
            if not found:
                continue
            if rule.change != "stack":
                return matches or [_match(rule, found.groupdict())]
            matches += [_match(rule, {**found.groupdict(), "e": str(e)}) for e in range(stacked)]
        if not matches:
            raise CheckpointError("has no name in the authors' layout", place=name)
        return matches


def _match(rule: KeyRule, values: dict[str, str]) -> Match:
    natives = tuple(native.format(**values) for native in rule.native)
    original = rule.original.format(**values)
    return Match(original, natives, rule.change, int(values.get("e", 0)), rule.part)


def _compile(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    kinds = (("i", r"\d+"), ("e", r"\d+"), ("p", "weight|bias"), ("leaf", r"\w+"), ("rest", ".+"))
    for name, kind in kinds:
        pattern = pattern.replace(re.escape("{" + name + "}"), f"(?P<{name}>{kind})")
    return re.compile(pattern)
