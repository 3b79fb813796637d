"""The ways to train that are compared; all compute the same gradient of the same samples.

plain                         padded batches, the tower for every sample, logits everywhere
plain, checkpointing          the same; the LLM's layers are computed again for the backward pass
vlft, no sharing, no cache    rows of PackedLoss, the tower once per row, logits at targets alone
vlft                          equal prefixes once, the tower once per job
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from vlft.config import JOINED_TOKENS
from vlft.data.encode import IGNORE
from vlft.models.adaptations import prepare_for_training, restore
from vlft.packing.packer import Packer
from vlft.training.loss import PackedLoss
from vlft.vision.batches import cut_batches, encode_batch
from vlft.vision.encode import RowImages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.models import RandomModel
    from benchmarks.samples import Samples
    from vlft.data.encode import EncodedImage, EncodedSample
    from vlft.families.processor import Processor
    from vlft.packing.prefix_tree import PackedBatch


@dataclass(frozen=True)
class Side:
    """One way to train.

    Attributes:
        name: in the table.
        forwards: passes through the LLM in an epoch.
        tokens: that the LLM sees in an epoch, padding included.
        epoch: leaves the gradient in the model, returns the loss in nats per trained token.
        encode: done once, before the first epoch; returns the number of images.
    """

    name: str
    forwards: int
    tokens: int
    epoch: Callable[[], float]
    encode: Callable[[], float] | None = None


@dataclass(frozen=True)
class BatchSize:
    """Bounds of a padded batch; a longer sample is a batch of its own.

    Attributes:
        samples: at most.
        tokens: at most, padding included.
    """

    samples: int
    tokens: int


def all_sides(built: RandomModel, job: Samples, size: BatchSize, tokens_per_row: int) -> list[Side]:
    """The sides in the order of the table; the first is the one compared with."""
    return [
        plain_side(built, job, size, checkpointing=False),
        plain_side(built, job, size, checkpointing=True),
        unshared_side(built, job, tokens_per_row),
        vlft_side(built, job, tokens_per_row),
    ]


def plain_side(built: RandomModel, job: Samples, size: BatchSize, *, checkpointing: bool) -> Side:
    """Transformers and peft, as an experienced user writes it."""
    batches = padded_batches(job.samples, size)

    def epoch() -> float:
        total = 0.0
        with plain_model(built, checkpointing=checkpointing):
            for batch in batches:
                with built.precision():
                    loss = padded_loss(built, job, batch) / job.targets
                torch.autograd.backward(loss)
                total += loss.item()
        return total

    name = "plain, checkpointing" if checkpointing else "plain"
    tokens = sum(len(batch) * max(map(len, batch)) for batch in batches)
    return Side(name, len(batches), tokens, epoch)


def unshared_side(built: RandomModel, job: Samples, tokens_per_row: int) -> Side:
    """vlft with ``--no-share-prefix --vision-cache off``: pixels go in with each row."""

    def pixels(row: PackedBatch) -> RowImages:
        return RowImages("pixels", job.inputs_of(row.images), tiles_of(row))

    name = "vlft, no sharing, no cache"
    return packed_side(built, job, name, tokens_per_row, share=False, images=pixels)


def vlft_side(built: RandomModel, job: Samples, tokens_per_row: int) -> Side:
    """vlft with sharing and the vision cache, its defaults."""
    kept: dict[EncodedImage, Tensor] = {}

    def encode() -> float:
        kept.update(encode_images(built, job))
        return len(kept)

    def features(row: PackedBatch) -> RowImages:
        parts = [kept[image] for image in row.images]
        tensors = {"features": torch.cat(parts)} if parts else {}
        return RowImages("aligned", tensors, tiles_of(row))

    return packed_side(
        built, job, "vlft", tokens_per_row, share=True, images=features, encode=encode
    )


def packed_side(
    built: RandomModel,
    job: Samples,
    name: str,
    tokens_per_row: int,
    *,
    share: bool,
    images: Callable[[PackedBatch], RowImages],
    encode: Callable[[], float] | None = None,
) -> Side:
    """Rows of PackedLoss, as training.loop.take_step does them.

    Args:
        built: the model.
        job: what it is trained on.
        name: of the side.
        tokens_per_row: at most.
        share: whether equal prefixes are held once.
        images: the images of a row.
        encode: see Side.
    """
    objective = PackedLoss(built.model, built.family)
    device = built.weight.device

    def rows() -> list[PackedBatch]:
        joined = JOINED_TOKENS[device.type]
        return Packer(built.shape.image_token_id, tokens_per_row, joined, share).rows(job.samples)

    def epoch() -> float:
        total = 0.0
        for row in rows():
            with built.precision():
                loss = objective(row.to(device), images(row).to(device)) / job.targets
            torch.autograd.backward(loss)
            total += loss.item()
        return total

    made = rows()
    return Side(name, len(made), sum(map(len, made)), epoch, encode)


def padded_batches(samples: list[EncodedSample], size: BatchSize) -> list[list[EncodedSample]]:
    """Samples of about the same length together, so that little is padded; the longest first."""

    def has_room(batch: list[EncodedSample]) -> bool:
        more = len(batch) + 1
        # The first of a batch is its longest.
        return more <= size.samples and more * len(batch[0]) <= size.tokens

    batches: list[list[EncodedSample]] = []
    for sample in sorted(samples, key=len, reverse=True):
        if not batches or not has_room(batches[-1]):
            batches.append([])
        batches[-1].append(sample)
    return batches


def padded_loss(built: RandomModel, job: Samples, batch: list[EncodedSample]) -> Tensor:
    """Sum of the losses of a batch, in nats, from logits at all of its positions."""
    device = built.weight.device
    ids = pad_sequence([sample.input_ids for sample in batch], batch_first=True)
    mask = pad_sequence([torch.ones_like(s.input_ids) for s in batch], batch_first=True)
    labels = pad_sequence([s.labels for s in batch], batch_first=True, padding_value=IGNORE)
    # Padding is on the right: positions, which the model counts from the left, are the samples'.
    logits = built.tuned(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        use_cache=False,
        **job.inputs_of([image for sample in batch for image in sample.images]),
    ).logits
    # As transformers shifts: the labels move, so that the logits need not be copied.
    following = F.pad(labels, (0, 1), value=IGNORE)[:, 1:].to(device)
    return F.cross_entropy(
        logits.float().flatten(0, 1), following.flatten(), ignore_index=IGNORE, reduction="sum"
    )


@contextmanager
def plain_model(built: RandomModel, *, checkpointing: bool) -> Iterator[None]:
    """The model as transformers has it: a loop over experts; checkpointing if asked for."""
    restore(built.model)
    if built.shape.experts is not None:
        built.model.set_experts_implementation("eager")
    if checkpointing:
        built.language.activation_checkpointing_enable({"use_reentrant": False})
        # Only reentrant checkpointing needs gradients of the inputs.
        built.language.disable_input_require_grads()
    try:
        yield
    finally:
        built.language.activation_checkpointing_disable()
        prepare_for_training(built.model, built.family.parts.language)


@torch.no_grad()
def encode_images(built: RandomModel, job: Samples) -> dict[EncodedImage, Tensor]:
    """Features of every image, on the CPU, in batches as vlft cuts them."""
    # All that is asked of a processor here.
    processor = cast("Processor", SimpleNamespace(family=built.family, pixels=built.pixels))
    found: dict[EncodedImage, Tensor] = {}
    for batch in cut_batches(list(job.views), processor):
        views = torch.cat([job.views[image] for image in batch])
        features = encode_batch(built.model, processor, batch, "aligned", views)
        found.update(zip(batch, features, strict=True))
    return found


def tiles_of(row: PackedBatch) -> tuple[tuple[int, int], ...]:
    """Of each image of a row."""
    return tuple(image.tiles for image in row.images)


def gradient(tuned: nn.Module) -> Tensor:
    """All LoRA gradients as one vector on the CPU; they are cleared."""
    trained: list[Any] = [p.grad for p in tuned.parameters() if p.grad is not None]
    vector = torch.cat([found.flatten() for found in trained]).cpu()
    tuned.zero_grad()
    return vector
