"""The two ways to compute the gradient of an optimiser step.

plain   padded batches, an image encoded once per sample, logits at every position
vlft    rows of PackedLoss, an image encoded once per row, logits only at targets
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from vlft.data.encode import IGNORE
from vlft.families.deepseek_vl import FAMILY
from vlft.packing.schedule import pack_rows
from vlft.training.loss import PackedLoss
from vlft.vision.encode import RowImages

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.workload import Workload


@dataclass(frozen=True)
class Side:
    """One way to compute the gradient of a step.

    Attributes:
        name: in the table.
        forwards: passes through the model.
        tokens: tokens that the LLM sees.
        step: leaves the gradient in the model, returns the loss in nats per trained token.
    """

    name: str
    forwards: int
    tokens: int
    step: Callable[[], float]


def plain_loss(tuned: nn.Module, work: Workload, first: int, size: int) -> Tensor:
    """Sum of the losses of a padded batch, in nats: the usual way, with peft's model."""
    samples = work.samples[first : first + size]
    ids = pad_sequence([sample.input_ids for sample in samples], batch_first=True)
    labels = pad_sequence([s.labels for s in samples], batch_first=True, padding_value=IGNORE)
    mask = pad_sequence([torch.ones_like(s.input_ids) for s in samples], batch_first=True)
    pixels = torch.stack([work.pixels[sample.images[0].key] for sample in samples])
    logits = tuned(
        input_ids=ids.to(pixels.device),
        attention_mask=mask.to(pixels.device),
        pixel_values=pixels,
        use_cache=False,
    ).logits
    # As transformers shifts: the labels move, so that the logits need not be copied.
    labels = F.pad(labels, (0, 1), value=IGNORE)[:, 1:].to(pixels.device)
    return F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )


def plain_side(tuned: nn.Module, work: Workload, size: int, precision: Any) -> Side:
    """The plain computation over padded batches of ``size`` samples."""
    starts = range(0, len(work.samples), size)

    def step() -> float:
        total = 0.0
        for first in starts:
            with precision():
                loss = plain_loss(tuned, work, first, size) / work.targets
            loss.backward()
            total += loss.item()
        return total

    tokens = sum(len(sample) for sample in work.samples)
    return Side(f"plain, batches of {size}", len(starts), tokens, step)


def packed_side(
    model: nn.Module, work: Workload, tokens_per_row: int, share: bool, precision: Any
) -> Side:
    """vlft's computation, as training.loop.take_step does it."""
    objective = PackedLoss(model, FAMILY)

    def rows() -> list[Any]:
        return pack_rows(
            work.samples, work.image_token_id, tokens_per_row=tokens_per_row, share=share
        )

    def step() -> float:
        total = 0.0
        for row in rows():
            pixels = torch.stack([work.pixels[image.key] for image in row.images])
            tiles = tuple(image.tiles for image in row.images)
            images = RowImages("pixels", {"pixel_values": pixels}, tiles)
            with precision():
                loss = objective(row.to(pixels.device), images) / work.targets
            loss.backward()
            total += loss.item()
        return total

    name = "vlft" if share else "vlft, sharing off"
    made = rows()
    return Side(f"{name}, rows of {tokens_per_row}", len(made), sum(len(row) for row in made), step)


def gradient(tuned: nn.Module) -> Tensor:
    """All LoRA gradients as one vector; they are cleared."""
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    vector = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
    tuned.zero_grad()
    return vector
