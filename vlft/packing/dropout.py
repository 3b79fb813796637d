"""Which prompts of drawn images a step leaves out, so that the model also learns to draw without.

Classifier-free guidance compares scores with and without the prompt; see data.drawing for what
stands in its place.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vlft.data.outline import Outline


@dataclass(frozen=True)
class PromptDropout:
    """Leaves out prompts by chance; it depends on seed, epoch and sample, and on nothing else.

    Attributes:
        share: of the samples that draw.
        pad_id: stands in the place of the prompt's tokens.
    """

    share: float
    seed: int
    pad_id: int

    def drops(self, epoch: int, index: int, outline: Outline) -> bool:
        """Whether a sample loses its prompt in an epoch."""
        if not any(image.drawn for image in outline.images):
            return False
        return random.Random(f"{self.seed}/{epoch}/{index}/prompt").random() < self.share

    def outline(self, outline: Outline) -> Outline:
        """The outline of a sample without its prompt, see data.drawing.unconditional."""
        drawn = outline.images[-1]
        padding = np.full(outline.tokens - drawn.tokens - 2, self.pad_id, np.int32)
        ids = np.concatenate([outline.ids[:1], padding, outline.ids[-2:]])
        return replace(
            outline, ids=ids, places=(len(ids) - 1,), images=(drawn,), targets=drawn.codes
        )
