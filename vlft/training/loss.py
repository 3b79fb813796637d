"""The loss of a packed row. Logits exist only where there is a target, and only in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlft.families.base import is_in
from vlft.models.adaptations import prepare_for_training
from vlft.models.flex import FLEX, padded_length
from vlft.models.tree_attention import TREE, has_fused_attention
from vlft.packing.attention import additive_mask, block_mask, kept_attention, row_attention
from vlft.vision.encode import place_features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlft.families.base import Family
    from vlft.packing.batch import PackedBatch
    from vlft.vision.encode import RowImages

# Positions whose logits exist at once: 128 x 102400 x 2 bytes = 26 MB in 16 bit. A GPU needs larger
# products to be busy.
CHUNK = {"cpu": 128, "cuda": 1024}
# Logits that become gradients at once; in 16 bit they have copies in float32.
LOGITS_AT_ONCE = {"cpu": 2**20, "cuda": 2**24}
# Of the gradients of logits in float16.
FLOAT16_SCALE = 4096.0


def token_loss_sum(hidden: Tensor, target: Tensor, weight: Tensor, head: nn.Module) -> Tensor:
    """Weighted sum of next-token cross-entropy, in nats.

    The gradients of a chunk are computed in the forward pass, while its logits exist: nothing of
    vocabulary size is kept for the backward pass or computed twice. (torch's own
    ``linear_cross_entropy`` is several times slower on the CPU and rounds the sum to the model's
    dtype; docs/performance.md has the figures.)

    Args:
        hidden: (S, D), last hidden states at the source positions.
        target: (S,) int64, ids of the tokens that follow.
        weight: (S,) float32.
        head: vocabulary projection, (S, D) -> (S, V), or the head that predicts codes.

    Returns:
        Scalar float32. Divide by the weights of the whole optimiser step.
    """
    if torch.is_grad_enabled():
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        total: Tensor = _EagerGradients.apply(hidden, target, weight, head, *trained)  # type: ignore[no-untyped-call]
        return total
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for part in _chunks(hidden):
        logits = _logits(head, hidden[part]).float()
        total += (weight[part] * F.cross_entropy(logits, target[part], reduction="none")).sum()
    return total


class _EagerGradients(torch.autograd.Function):
    """The loss with its gradients; the backward pass only rescales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        target: Tensor,
        weight: Tensor,
        head: nn.Module,
        *trained: nn.Parameter,
    ) -> Tensor:
        """Sums losses and gradients over the chunks."""
        scale = _inner_scale(hidden.dtype, weight)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        by_hidden = torch.zeros_like(hidden)
        by_trained = [torch.zeros_like(parameter) for parameter in trained]
        for part in _chunks(hidden):
            loss, found = _chunk_gradients(
                hidden[part], target[part], weight[part], scale, head, trained
            )
            total += loss
            by_hidden[part] = found[0]
            for kept, of_chunk in zip(by_trained, found[1:], strict=True):
                kept += of_chunk
        ctx.save_for_backward(scale, by_hidden, *by_trained)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Rescales the gradients of hidden states and head."""
        scale, *gradients = ctx.saved_tensors
        by_hidden, *by_trained = (kept * (upstream[0] / scale) for kept in gradients)
        return by_hidden, None, None, None, *by_trained


def _inner_scale(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """The factor with which gradients are computed in the forward pass.

    In float16 those of a confident model underflow: a gradient scaler multiplies the loss only
    later, in the backward pass. The largest gradient of a logit is then FLOAT16_SCALE, far enough
    from 65504, the largest number.
    """
    if dtype == torch.float16:
        return FLOAT16_SCALE / weight.max()
    return torch.ones((), device=weight.device)


def _chunks(hidden: Tensor) -> list[slice]:
    """The positions of (S, D) that are computed at once."""
    size = CHUNK[hidden.device.type]
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def _logits(head: nn.Module, hidden: Tensor) -> Tensor:
    # Not called as a module: ZeRO-3 would gather the weights once per chunk, and ranks with fewer
    # chunks would not take part.
    logits: Tensor = head.forward(hidden)
    return logits


def _chunk_gradients(
    hidden: Tensor,
    target: Tensor,
    weight: Tensor,
    scale: Tensor,
    head: nn.Module,
    trained: Sequence[nn.Parameter],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, and scale times its gradients by the hidden states and the head's parameters."""
    with torch.enable_grad():
        rows = hidden.detach().requires_grad_()
        logits = _logits(head, rows)
    loss = _loss_to_gradient(logits.detach(), target, weight, scale)
    return loss, torch.autograd.grad(logits, [rows, *trained], logits.detach())


def _loss_to_gradient(logits: Tensor, target: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The weighted sum of losses; logits (S, V) become scale times its gradient by them.

    Computed in float32, a few positions at a time; autograd would hold all logits three times. The
    sum of the other tokens stands apart, so that the gradient of a target that is all but certain
    is not rounded to zero.
    """
    positions = max(1, LOGITS_AT_ONCE[logits.device.type] // logits.shape[1])
    factors = (weight * scale).unsqueeze(1)
    losses = torch.empty_like(weight)
    for start in range(0, len(target), positions):
        part = slice(start, start + positions)
        own = target[part].unsqueeze(1)
        # In float32 these are the logits themselves.
        scores = logits[part].float()
        scores.sub_(scores.amax(1, keepdim=True))
        of_target = scores.gather(1, own)
        others = scores.exp_().scatter_(1, own, 0.0).sum(1, keepdim=True)
        total = others + of_target.exp()
        losses[part] = (total.log() - of_target).squeeze(1)
        factor = factors[part] / total
        logits[part] = scores.mul_(factor).scatter_(1, own, -factor * others)
    # Not a product of vectors, which autocast would compute in 16 bits.
    return (losses * weight).sum()


class PackedLoss(nn.Module):
    """The model as the loop sees it: a packed row in, its loss sum out.

    It is one module with one forward, because DDP and FSDP2 wrap a module's forward.

    Args:
        model: transformers' class, with peft's layers in place if there are any.
        family: of the model.

    Attributes:
        code_loss: the part of the last loss that is of codes of drawn images, in nats.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.code_loss = torch.zeros(())
        prepare_for_training(model, family.parts.language)

    def forward(self, batch: PackedBatch, images: RowImages) -> Tensor:
        """Weighted sum of the row's losses, in nats; scalar float32."""
        hidden = source_states(self.model, self.family, batch, images)
        texts, generator = len(batch.source), self.family.generator
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        self.code_loss = loss
        if texts:
            head = self.model.get_submodule(self.family.parts.head)
            loss = token_loss_sum(hidden[:texts], batch.target, batch.weight, head)
        if images.codes is not None and generator is not None:
            head, target = (
                self.model.get_submodule(generator.head),
                images.codes[batch.codes.target],
            )
            of_codes = token_loss_sum(hidden[texts:], target, batch.codes.weight, head)
            self.code_loss = of_codes.detach()
            loss = loss + of_codes
        # All ranks must reduce gradients of the same parameters, whatever their rows hold.
        unused = self._unused_parts(batch, images)
        named = self.model.named_parameters()
        idle = [p for name, p in named if p.requires_grad and is_in(name, unused)]
        return loss + sum(0.0 * parameter.sum() for parameter in idle)

    def _unused_parts(self, batch: PackedBatch, images: RowImages) -> list[str]:
        """The parts that a row does not use, of those that some rows do not use."""
        parts, generator = self.family.parts, self.family.generator
        unused = [] if images.tiles else [*parts.vision, *parts.aligner]
        unused += [] if len(batch.source) else [parts.head]
        if generator is not None and images.codes is None:
            unused += [generator.head, generator.aligner]
        return unused


def source_states(
    model: nn.Module, family: Family, batch: PackedBatch, images: RowImages
) -> Tensor:
    """(S + C, D) last hidden states at a row's source positions, those of codes last."""
    embeddings = place_features(
        model, family, batch.input_ids, images, batch.image_positions, batch.feature_rows
    )
    if images.codes is not None and family.generator is not None:
        codes = family.generator.embed(model, images.codes[batch.codes.inputs])
        codes = codes.to(embeddings.dtype).unsqueeze(0)
        embeddings = torch.index_copy(embeddings, 1, batch.codes.positions, codes)
    language: Any = model.get_submodule(family.parts.language)
    # The last layer takes them in the order of the row.
    kept, order = torch.cat([batch.source, batch.codes.source]).sort(stable=True)
    implementation = language.config._attn_implementation
    output = language(
        inputs_embeds=embeddings,
        **_attention_of(implementation, batch, kept, _scores_dtype(embeddings)),
        position_ids=batch.position_ids,
        use_cache=False,
        positions_to_keep=kept,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden if images.codes is None else hidden.index_select(0, order.argsort())


def _attention_of(
    implementation: str, batch: PackedBatch, kept: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """The LLM's keyword arguments for the attention of a packed row; ``kept`` as for the layer."""
    # A dummy 4-D mask, so that transformers does not build its own.
    empty = torch.empty((1, 1, 0, 0), device=batch.exit.device)
    if implementation == FLEX:
        padded = block_mask(batch.exit, batch.window, padded_length(len(batch)))
        return {"attention_mask": empty, "row": padded}
    if implementation == TREE:
        fused = has_fused_attention(batch.exit.device)
        row = row_attention(batch.segments, batch.exit, dtype, batch.window, fused=fused)
        kept_row = kept_attention(row, kept, batch.exit, dtype, batch.window)
        return {"attention_mask": empty, "row": row, "kept_row": kept_row}
    return {"attention_mask": additive_mask(batch.exit, dtype, batch.window)}


def _scores_dtype(embeddings: Tensor) -> torch.dtype:
    """The dtype in which attention computes its scores."""
    device = embeddings.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return embeddings.dtype
