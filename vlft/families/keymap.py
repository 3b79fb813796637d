"""Tensor names in the authors' layout <-> tensor names in the model's class ("native").

authors' file             change      native tensor
blocks.3.attn.qkv.bias    split       layers.3.self_attn.{q,k,v}_proj.bias
pos_embed [1, n, W]       squeeze     embeddings.position_embedding.weight [n, W]
norm.weight               rename      post_layernorm.weight
experts.5.up_proj [I, D]  stack       second half of experts.gate_up_proj[5], of [E, 2I, D]
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
    """A rule of the table.

    In names ``{i}`` and ``{e}`` stand for numbers, ``{p}`` for weight or bias, ``{leaf}`` for one
    word and ``{rest}`` for anything.

    Attributes:
        original: name in the authors' layout.
        native: name or names in the model's class.
        change: rename; split: the original is the native tensors concatenated along rows; squeeze:
            the original has a leading axis of size 1; stack: the native tensor contains many
            originals, the one numbered ``{e}`` at index e of its first axis.
        part: for stack, (index, count): which of ``count`` equal blocks of rows there it is.
    """

    original: str
    native: tuple[str, ...]
    change: Change = "rename"
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Match(KeyRule):
    """A rule with its names filled in: how one original tensor and its native ones correspond.

    Attributes:
        index: for stack, in the first axis of the native tensor.
    """

    index: int = 0

    def to_native(self, tensor: Tensor) -> list[Tensor]:
        """The native tensors of an original one; not for stack, which needs all originals."""
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
        """The view of a stacked native tensor (E, rows, columns) that is the original.

        Raises:
            IndexError: the native tensor has no such index.
        """
        place, count = self.part
        rows = stacked.shape[1] // count
        return stacked[self.index, place * rows : (place + 1) * rows]


class KeyMap:
    """The table of a family, read in both directions.

    Args:
        rules: the first that matches decides.
        unused: patterns of original names that no module uses; export copies those tensors.
    """

    def __init__(self, rules: Iterable[KeyRule], unused: Iterable[str] = ()) -> None:
        table = list(rules)
        self._from_original = [(_compile(rule.original), rule) for rule in table]
        self._from_native = [(_compile(name), rule) for rule in table for name in rule.native]
        self._unused = [_compile(name) for name in unused]

    def is_unused(self, original: str) -> bool:
        """Whether the tensor belongs to the checkpoint but to no module."""
        return any(pattern.fullmatch(original) for pattern in self._unused)

    def from_original(self, name: str) -> Match | None:
        """The correspondence of an original name, None if there is no rule for it."""
        for pattern, rule in self._from_original:
            found = pattern.fullmatch(name)
            if found:
                return _match(rule, found.groupdict())
        return None

    def from_native(self, name: str, stacked: int = 1) -> list[Match]:
        """The correspondences of a native name; several only for stack.

        ``stacked`` is the length of the tensor's first axis.

        Raises:
            CheckpointError: there is no rule for it.
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
    return Match(original, natives, rule.change, rule.part, int(values.get("e", 0)))


def _compile(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    kinds = (("i", r"\d+"), ("e", r"\d+"), ("p", "weight|bias"), ("leaf", r"\w+"), ("rest", ".+"))
    for name, kind in kinds:
        pattern = pattern.replace(re.escape("{" + name + "}"), f"(?P<{name}>{kind})")
    return re.compile(pattern)
