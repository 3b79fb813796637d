"""Random samples of a workload, without tokenizer and image files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vlft.data.encode import IGNORE, ChatFormat, EncodedImage, EncodedSample
from vlft.families.processor import Processor
from vlft.vision.encode import moved

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.models import RandomModel
    from vlft.families.base import Views

SEED = 0
BOS = 1
Bounds = tuple[int, int]


@dataclass(frozen=True)
class Workload:
    """What the samples of a job look like: bounds, both included, that numbers are drawn from."""

    # Of a sample, at the beginning of its first message.
    images: Bounds = (1, 1)
    # On the same images.
    samples: Bounds = (1, 1)
    turns: Bounds = (1, 1)
    # Tokens; those of the reply are trained, those of the system prompt are in all samples.
    question: Bounds = (20, 20)
    reply: Bounds = (24, 24)
    system: int = 45
    # Of the SigLIP tower, in pixels.
    image_size: int = 384


WORKLOADS = {
    **{f"q{n}": Workload(samples=(n, n)) for n in (1, 2, 5, 10)},
    **{f"long{n}": Workload(samples=(n, n), reply=(256, 256)) for n in (1, 5)},
    "caption": Workload(reply=(280, 280)),
    "text": Workload(images=(0, 0), question=(100, 600), reply=(24, 256)),
    "mixed": Workload((0, 2), (1, 3), (1, 3), question=(20, 300), reply=(8, 300)),
    **{f"size224-q{n}": Workload(samples=(n, n), image_size=224) for n in (1, 5)},
    **{f"size512-q{n}": Workload(samples=(n, n), image_size=512) for n in (1, 5)},
    **{f"reply{tokens}": Workload(reply=(tokens, tokens)) for tokens in (128, 512)},
}


@dataclass(frozen=True)
class RandomProcessor(Processor):
    """A processor whose images are random values in memory instead of files, by their keys.

    ``views`` are float32 on the CPU, as decoded; ``inputs`` are the model's.
    """

    views: dict[str, Views]
    inputs: dict[str, dict[str, Any]]

    def pixel_values(self, images: Sequence[EncodedImage], **_: bool) -> list[Views]:
        """See Processor."""
        return [self.views[image.key] for image in images]

    def image_inputs(self, images: Sequence[EncodedImage]) -> dict[str, Any]:
        """See Processor."""
        parts = [self.inputs[image.key] for image in images]
        names = parts[0] if parts else ()
        return {name: joined([part[name] for part in parts]) for name in names}


def joined(values: list[Any]) -> Any:
    """Tensors or lists end to end."""
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    return [item for value in values for item in value]


@dataclass(frozen=True)
class Samples:
    """The samples of a job, their distinct images, and the number of their trained tokens."""

    samples: list[EncodedSample]
    images: list[EncodedImage]
    processor: RandomProcessor
    targets: int


def random_samples(workload: Workload, built: RandomModel, count: int) -> Samples:
    """``count`` samples; those on the same images follow each other."""
    image_token_id = built.native["image_token_id"]
    generator = torch.Generator().manual_seed(SEED)

    def number(bounds: Bounds) -> int:
        return int(torch.randint(bounds[0], bounds[1] + 1, (), generator=generator))

    def text(tokens: int) -> Tensor:
        # The first two ids and the last one, the image token, have a meaning.
        return torch.randint(2, image_token_id, (tokens,), generator=generator)

    system = torch.cat([torch.tensor([BOS]), text(workload.system)])

    def sample(group: Sequence[EncodedImage]) -> EncodedSample:
        prompt = (torch.full((image.tokens,), image_token_id) for image in group)
        parts = [(ids, False) for ids in (system, *prompt)]
        for _ in range(number(workload.turns)):
            parts.append((text(number(workload.question)), False))
            parts.append((text(number(workload.reply)), True))
        labels = [ids if trained else torch.full_like(ids, IGNORE) for ids, trained in parts]
        all_ids = torch.cat([ids for ids, _ in parts])
        return EncodedSample(all_ids, torch.cat(labels), "", tuple(group))

    samples: list[EncodedSample] = []
    images: list[EncodedImage] = []
    while len(samples) < count:
        group: list[EncodedImage] = []
        for _ in range(number(workload.images)):
            key = f"image {len(images) + len(group)}"
            group.append(EncodedImage(Path(key), key, built.image_tokens, built.tiles))
        images += group
        for _ in range(min(number(workload.samples), count - len(samples))):
            samples.append(sample(group))
    targets = sum(int((sample.labels != IGNORE).sum()) for sample in samples)

    pixels, tiles = built.pixels, built.tiles
    views = {
        image.key: tuple(
            torch.randn(count, 3, side, side, generator=generator)
            for count, side in pixels.sizes(tiles)
        )
        for image in images
    }
    inputs = {k: moved(pixels.inputs([v], [tiles]), built.weight) for k, v in views.items()}
    # Nothing else of the chat format is asked for where there is no text.
    chat = cast("ChatFormat", SimpleNamespace(image_token_id=image_token_id, pad_id=0))
    processor = RandomProcessor(built.family, chat, pixels, 4096, views, inputs)
    return Samples(samples, images, processor, targets)
