"""Random samples of a workload, without tokenizer and image files."""

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
    """The samples of a job, with what the processor makes of their images.

    Attributes:
        samples: without pixels.
        views: image -> (V, 3, H, W) float32 on the CPU, as decoded.
        inputs: image -> the model's keyword arguments, in its dtype, where it is.
        targets: trained tokens of all samples.
    """

    samples: list[EncodedSample]
    views: dict[EncodedImage, Tensor]
    inputs: dict[EncodedImage, dict[str, Tensor]]
    targets: int

    def inputs_of(self, images: Sequence[EncodedImage]) -> dict[str, Tensor]:
        """The model's keyword arguments for some images, in order; none without images."""
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
    """``count`` samples; those on the same images follow each other."""
    draw = Draw(built.shape.vocabulary)
    system = torch.cat([torch.tensor([BOS]), draw.text(workload.system)])
    samples: list[EncodedSample] = []
    images: list[EncodedImage] = []
    while len(samples) < count:
        group = tuple(
            new_image(built, len(images) + place) for place in range(draw.number(workload.images))
        )
        images += group
        for _ in range(min(draw.number(workload.samples), count - len(samples))):
            samples.append(random_sample(workload, built.shape.image_token_id, draw, system, group))
    views = {image: random_views(built, draw) for image in images}
    inputs = {
        image: moved(built.pixels.inputs(values, [image.tiles]), built.weight)
        for image, values in views.items()
    }
    targets = sum(int((sample.labels != IGNORE).sum()) for sample in samples)
    return Samples(samples, views, inputs, targets)


def new_image(built: RandomModel, number: int) -> EncodedImage:
    """An image that differs from all of another number."""
    key = f"image {number}"
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
    images: tuple[EncodedImage, ...],
) -> EncodedSample:
    """System prompt, images, then questions and replies in turn; the replies are trained."""
    prompt = [torch.full((image.tokens,), image_token_id) for image in images]
    parts = [(tokens, False) for tokens in (system, *prompt)]
    for _ in range(draw.number(workload.turns)):
        parts.append((draw.text(draw.number(workload.question)), False))
        parts.append((draw.text(draw.number(workload.reply)), True))
    labels = [tokens if trained else torch.full_like(tokens, IGNORE) for tokens, trained in parts]
    ids = torch.cat([tokens for tokens, _ in parts])
    return EncodedSample(ids, torch.cat(labels), "", images)
