"""The published checkpoints: facts in published.json, which tests compare with the models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vlft.planning.sizes import TextSizes, TowerSizes, text_sizes


@dataclass(frozen=True)
class PublishedModel:
    """A checkpoint on the hub.

    Attributes:
        billions: parameters in its files, in 1e9.
        image_tokens: fewest and most tokens that an image becomes.
        towers: those that see the images; see planning.sizes.
    """

    id: str
    family: str
    billions: float
    image_tokens: tuple[int, int]
    llm: TextSizes
    towers: tuple[TowerSizes, ...]


_FACTS = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
_LLMS = {name: text_sizes(text) for name, text in _FACTS["llms"].items()}
_TOWERS = {name: TowerSizes(**sizes) for name, sizes in _FACTS["towers"].items()}
PUBLISHED_MODELS = tuple(
    PublishedModel(
        row["id"], row["family"], row["billions"], tuple(row["image_tokens"]),
        _LLMS[row["llm"]], tuple(_TOWERS[name] for name in row["towers"]),
    )
    for row in _FACTS["models"]
)  # fmt: skip
