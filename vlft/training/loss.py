"""The loss of a packed row. Logits exist only where there is a target, and only in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlft.packing.attention import additive, tree_mask
from vlft.vision.encode import place_features

if TYPE_CHECKING:
    from vlft.families.base import Family
    from vlft.packing.prefix_tree import PackedBatch
    from vlft.vision.encode import RowImages

# Positions whose logits exist at once: 512 x 102400 x 4 bytes = 200 MB, thrice in backward.
CHUNK = 512


def token_loss_sum(hidden: Tensor, target: Tensor, weight: Tensor, head: nn.Linear) -> Tensor:
    """Weighted sum of next-token cross-entropy, in nats.

    Each chunk's logits are recomputed in the backward pass instead of kept. (torch's own
    ``linear_cross_entropy`` is several times slower on the CPU and rounds the sum to the model's
    dtype; docs/performance.md has the figures.)

    Args:
        hidden: (S, D), last hidden states at the source positions.
        target: (S,) int64, ids of the tokens that follow.
        weight: (S,) float32.
        head: vocabulary projection, (V, D).

    Returns:
        Scalar float32. Divide by the weights of the whole optimiser step.
    """
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(target), CHUNK):
        part = slice(start, start + CHUNK)
        total = total + checkpoint(
            _chunk_loss, hidden[part], target[part], weight[part], head, use_reentrant=False
        )
    return total


def _chunk_loss(hidden: Tensor, target: Tensor, weight: Tensor, head: nn.Linear) -> Tensor:
    losses = F.cross_entropy(head(hidden).float(), target, reduction="none")
    return (losses * weight).sum()


class PackedLoss(nn.Module):
    """The model as the loop sees it: a packed row in, its loss sum out.

    One module with one forward, so that wrappers for several processes find all of the work in it.

    Args:
        model: transformers' class, with peft's layers in place if there are any.
        family: of the model.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__()
        self.model = model
        self.family = family

    def forward(self, batch: PackedBatch, images: RowImages) -> Tensor:
        """Weighted sum of the row's losses, in nats; scalar float32."""
        hidden = last_hidden(self.model, self.family, batch, images)
        head: Any = self.model.get_submodule(self.family.parts.head)
        return token_loss_sum(hidden[0, batch.source], batch.target, batch.weight, head)


def last_hidden(model: nn.Module, family: Family, batch: PackedBatch, images: RowImages) -> Tensor:
    """(1, N, D) last hidden states of a packed row."""
    embeddings = place_features(
        model, family, batch.input_ids, images, batch.image_positions, batch.feature_rows
    )
    language: Any = model.get_submodule(family.parts.language)
    mask = tree_mask(batch.exit)
    if language.config._attn_implementation == "eager":
        mask = additive(mask, embeddings.dtype)
    output = language(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden
