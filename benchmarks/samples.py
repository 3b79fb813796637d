"""Random samples of a workload, without tokenizer and picture files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlft.data.encode import IGNORE, EncodedImage, EncodedSample
from vlft.vision.encode import moved

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.models import RandomModel
    from benchmarks.workloads import Bounds, Workload

BOS = 1
SEED = 0


@dataclass(frozen=True)
class Samples:
    """The samples of a job, with what the processor makes of their pictures.

    Attributes:
        samples: without pixels.
        views: picture -> (V, 3, H, W) float32 on the CPU, as decoded.
        inputs: picture -> the model's keyword arguments, in its dtype, where it is.
        targets: trained tokens of all samples.
    """

    samples: list[EncodedSample]
    views: dict[EncodedImage, Tensor]
    inputs: dict[EncodedImage, dict[str, Tensor]]
    targets: int

    def inputs_of(self, images: Sequence[EncodedImage]) -> dict[str, Tensor]:
        """The model's keyword arguments for some pictures, in order; none without pictures."""
        parts = [self.inputs[image] for image in images]
        return (
            {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
        )


class Draw:
    """Random numbers that depend on the seed alone.

    Args:
        vocabulary: tokens; the first two and the last have a meaning and are not drawn.
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.generator = torch.Generator().manual_seed(SEED)

    def number(self, bounds: Bounds) -> int:
        """A number within the bounds."""
        least, most = bounds
        return int(torch.randint(least, most + 1, (), generator=self.generator))

    def text(self, tokens: int) -> Tensor:
        """(T,) ids."""
        return torch.randint(2, self.vocabulary - 1, (tokens,), generator=self.generator)


def random_samples(workload: Workload, built: RandomModel, count: int) -> Samples:
    """``count`` samples; those on the same pictures follow each other."""
    draw = Draw(built.shape.vocabulary)
    system = torch.cat([torch.tensor([BOS]), draw.text(workload.system)])
    samples: list[EncodedSample] = []
    pictures: list[EncodedImage] = []
    while len(samples) < count:
        group = tuple(
            new_picture(built, len(pictures) + place)
            for place in range(draw.number(workload.pictures))
        )
        pictures += group
        for _ in range(min(draw.number(workload.samples), count - len(samples))):
            samples.append(random_sample(workload, built.shape.image_token_id, draw, system, group))
    views = {picture: random_views(built, draw) for picture in pictures}
    inputs = {
        picture: moved(built.pixels.inputs(values, [picture.tiles]), built.weight)
        for picture, values in views.items()
    }
    targets = sum(int((sample.labels != IGNORE).sum()) for sample in samples)
    return Samples(samples, views, inputs, targets)


def new_picture(built: RandomModel, number: int) -> EncodedImage:
    """A picture that differs from all of another number."""
    key = f"picture {number}"
    return EncodedImage(Path(key), key, built.image_tokens, built.shape.tiles)


def random_views(built: RandomModel, draw: Draw) -> Tensor:
    """(V, 3, H, W) float32: a whole view and tiles."""
    across, down = built.shape.tiles
    size = built.pixels.size
    return torch.randn(1 + across * down, 3, size, size, generator=draw.generator)


def random_sample(
    workload: Workload,
    image_token_id: int,
    draw: Draw,
    system: Tensor,
    pictures: tuple[EncodedImage, ...],
) -> EncodedSample:
    """System prompt, pictures, then questions and replies in turn; the replies are trained."""
    prompt = [torch.full((picture.tokens,), image_token_id) for picture in pictures]
    parts = [(tokens, False) for tokens in (system, *prompt)]
    for _ in range(draw.number(workload.turns)):
        parts.append((draw.text(draw.number(workload.question)), False))
        parts.append((draw.text(draw.number(workload.reply)), True))
    labels = [tokens if trained else torch.full_like(tokens, IGNORE) for tokens, trained in parts]
    ids = torch.cat([tokens for tokens, _ in parts])
    return EncodedSample(ids, torch.cat(labels), "", pictures)
