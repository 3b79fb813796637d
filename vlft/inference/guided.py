"""Guided sampling of the codes of images.

prompts, conditional and unconditional -> one prefill -> keys and values, repeated for each image
-> K steps: scores of both rows -> guided scores -> next code, for both rows
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vlft.config import DrawConfig
from vlft.data.drawing import unconditional
from vlft.errors import VlftError, shown
from vlft.inference.decoding import Draw
from vlft.models.cache_name import CACHE
from vlft.vision.encode import moved

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vlft.data.encode import EncodedSample
    from vlft.families.base import ImageGenerator
    from vlft.families.processor import Processor


@dataclass(frozen=True)
class Guidance:
    """How codes are chosen; see the flags of the same names."""

    cfg_weight: float = DrawConfig.cfg_weight
    temperature: float = DrawConfig.temperature

    @property
    def needs_unconditional(self) -> bool:
        """Whether scores without the prompt have a weight."""
        return self.cfg_weight != 1


class Order(NamedTuple):
    """A prompt, and the seed of each image that is drawn of it."""

    prompt: EncodedSample
    seeds: Sequence[int]


def draw_codes(
    model: Any,
    processor: Processor,
    generator: ImageGenerator,
    orders: Sequence[Order],
    guidance: Guidance,
    progress: Callable[[], object] = lambda: None,
) -> Tensor:
    """(B, K) int64 codes of the B images of all orders.

    Args:
        model: transformers' class, peft's layers in place if there are any.
        processor: of the model.
        generator: of its family.
        orders: their prompts end with the token that begins an image.
        guidance: how codes are chosen.
        progress: called once per code.

    Raises:
        VlftError: the model's scores are no numbers.
    """
    state = _prefill(model, processor, orders, guidance)
    parts = processor.family.parts
    head, language = model.get_submodule(generator.head), model.get_submodule(parts.language)
    seeds = [seed for order in orders for seed in order.seeds]
    noise = Draw(seeds, state.hidden.device).noise if guidance.temperature > 0 else None
    codes: list[Tensor] = []
    finite = torch.ones((), dtype=torch.bool, device=state.hidden.device)
    for number in range(processor.pixels.tokens or 0):
        scores = _guided(head(state.hidden).float(), guidance)
        finite &= scores.isfinite().all()
        if noise is not None:
            # The argmax of scores / temperature + noise, which low temperatures do not overflow.
            scores = scores + guidance.temperature * noise(scores)
        codes.append(scores.argmax(-1))
        progress()
        if number + 1 < (processor.pixels.tokens or 0):
            rows = codes[-1].repeat(2 if guidance.needs_unconditional else 1)
            state.step(language, generator.embed(model, rows.unsqueeze(1)))
    if not finite:
        found, hint = "its scores are no numbers (NaN)", "use --dtype float32 or bfloat16"
        raise VlftError(found, place=shown(model.name_or_path), hint=hint)
    return torch.stack(codes, 1)


@dataclass
class _State:
    """What the LLM knows of R rows, conditional ones before unconditional ones.

    Attributes:
        hidden: (R, D), last hidden states of the newest tokens.
        cache: keys and values of all tokens so far.
        mask: (R, T) int64, 0 for padding on the left; None if there is none.
        length: (R, 1) int64, tokens so far without padding.
    """

    hidden: Tensor
    cache: Any
    mask: Tensor | None
    length: Tensor

    def step(self, language: Any, embeddings: Tensor) -> None:
        """Appends a token with these (R, 1, D) input embeddings to each row."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.length)], 1)
        output = language(
            inputs_embeds=embeddings.to(self.hidden.dtype),
            attention_mask=self.mask,
            position_ids=self.length,
            use_cache=True,
            **{CACHE: self.cache},
        )
        self.hidden = output.last_hidden_state[:, -1]
        self.length = self.length + 1


def _prefill(
    model: Any, processor: Processor, orders: Sequence[Order], guidance: Guidance
) -> _State:
    """The state of each image's rows after its prompt; each distinct prompt runs once.

    Unconditional prompts of one length are the same.
    """
    prompts = [order.prompt for order in orders]
    owners = [n for n, order in enumerate(orders) for _ in order.seeds]
    if guidance.needs_unconditional:
        places: dict[int, int] = {}
        for prompt in prompts:
            places.setdefault(len(prompt), len(orders) + len(places))
        empty = {len(p): unconditional(p, processor.chat) for p in prompts}
        prompts += [empty[length] for length in places]
        owners += [places[len(prompts[n])] for n in owners]
    inputs = moved(processor.collate(prompts), model.get_input_embeddings().weight)
    mask = inputs["attention_mask"]
    del inputs["labels"]
    inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    padded = not bool(mask.all())
    output = model.base_model(
        **{**inputs, "attention_mask": mask if padded else None}, use_cache=True
    )
    chosen = torch.tensor(owners, device=mask.device)
    cache = output[CACHE]
    cache.batch_select_indices(chosen)
    return _State(
        output.last_hidden_state[chosen, -1],
        cache,
        mask[chosen] if padded else None,
        mask.sum(1, keepdim=True)[chosen],
    )


def _guided(scores: Tensor, guidance: Guidance) -> Tensor:
    """(B, K) guided scores for those of both kinds of rows, (2 B, K), or of conditional ones."""
    if not guidance.needs_unconditional:
        return scores
    conditional, free = scores.chunk(2)
    return free + guidance.cfg_weight * (conditional - free)
