"""The published checkpoints: facts in published.json, which tests compare with the models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vlft.planning.sizes import TextSizes, text_sizes


@dataclass(frozen=True)
class PublishedModel:
    """A checkpoint on the hub.

    Attributes:
        billions: parameters in its files, in 1e9.
        image_tokens: fewest and most tokens that an image becomes.
        sam_scores: see planning.sizes.
    """

    id: str
    family: str
    billions: float
    image_tokens: tuple[int, int]
    llm: TextSizes
    sam_scores: int


_FACTS = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
_LLMS = {name: text_sizes(text) for name, text in _FACTS["llms"].items()}
PUBLISHED_MODELS = tuple(
    PublishedModel(**{**row, "llm": _LLMS[row["llm"]], "image_tokens": tuple(row["image_tokens"])})
    for row in _FACTS["models"]
)
