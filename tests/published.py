"""The thirteen published checkpoints, from published.json: config.json and the files' tensors.

The data was written from the authors' layout alone, not by vlft, so that a wrong default or a wrong
name in vlft cannot hide here. ``config`` has the fields that the file states; those left to
defaults are absent. In a tensor's name ``[0-3,weight]`` stands for each of 0, 1, 2, 3 and weight;
``parts`` are tensors that several checkpoints have. Tensors that no module uses are listed too.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Published:
    """A checkpoint of the hub.

    Attributes:
        name: hub id.
        config: config.json; shared between checkpoints of one size, so do not change it in place.
        patterns: names of tensors as in published.json, and their shapes.
    """

    name: str
    config: dict[str, Any]
    patterns: dict[str, list[int]]

    def tensors(self) -> Shapes:
        """The shape of every tensor in the files, by name."""
        shapes: Shapes = {}
        for pattern, shape in self.patterns.items():
            names = dict.fromkeys(expand(pattern), tuple(shape))
            assert not shapes.keys() & names.keys(), f"{pattern} repeats a tensor"
            shapes |= names
        return shapes


def expand(pattern: str) -> Iterator[str]:
    """The names that a pattern stands for."""
    pieces = re.split(r"\[(.*?)\]", pattern)
    choices = [choose(p) if place % 2 else [p] for place, p in enumerate(pieces)]
    return map("".join, itertools.product(*choices))


def choose(alternatives: str) -> list[str]:
    """What a bracket stands for: words, numbers, ranges of numbers."""
    found: list[str] = []
    for word in alternatives.split(","):
        first, dash, last = word.partition("-")
        found += map(str, range(int(first), int(last) + 1)) if dash else [word]
    return found


def count(tensors: Shapes) -> int:
    """Elements of all tensors."""
    return sum(map(prod, tensors.values()))


def read() -> tuple[Published, ...]:
    """The checkpoints of published.json."""
    data = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
    return tuple(
        Published(
            name,
            entry["config"],
            {k: v for part in entry.get("parts", ()) for k, v in data["parts"][part].items()}
            | entry["tensors"],
        )
        for entry in data["checkpoints"]
        for name in entry["names"]
    )


PUBLISHED = read()
