"""Prompts -> keys and values, with every common prefix computed once.

    prompts -> a packed row, see packing.prefix_tree -> the LLM runs it, a chunk after the other
    -> keys and values of the row -> a batch of prompts takes those of its own paths

Legend: N tokens of the row, K heads of keys and values, d their size; B prompts of a batch, padded
on the left to T tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlft.data.encode import IGNORE
from vlft.models.adaptations import filling_the_cache
from vlft.models.cache_name import CACHE
from vlft.models.tree_attention import has_fused_attention
from vlft.packing.attention import kept_attention, row_attention
from vlft.packing.prefix_tree import pack_with_paths
from vlft.vision.encode import place_features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from vlft.data.encode import EncodedSample
    from vlft.families.processor import Processor
    from vlft.inference.features import Features
    from vlft.packing.batch import PackedBatch

# Tokens that run through the LLM at once: what a layer computes of them is held at one time.
CHUNK = {"cpu": 2048, "cuda": 8192}
# Tokens of replies for which memory is taken at one time.
ROOM = 64


def can_share(prompts: Sequence[EncodedSample], processor: Processor) -> bool:
    """Whether prompts can be a row: not with windows, whose cache drops tokens.

    The last token of each runs with the reply, so that it must be text, with others before it.
    """
    image = processor.chat.image_token_id
    return processor.chat.window is None and all(
        len(prompt) > 1 and prompt.input_ids[-1] != image for prompt in prompts
    )


class SharedPrompts:
    """Prompts whose keys and values are known but for their last tokens.

    Args:
        model: transformers' class, with peft's layers in place if there are any.
        processor: of the model.
        prompts: at least one, see ``can_share``.
        features: of their images.
        chunk: tokens of the row that run at once; None for the device's default.
    """

    def __init__(
        self,
        model: Any,
        processor: Processor,
        prompts: Sequence[EncodedSample],
        features: Features,
        chunk: int | None = None,
    ) -> None:
        self._prompts, self._processor = prompts, processor
        row, self._paths = pack_with_paths(
            [_without_last(prompt) for prompt in prompts], processor.chat.image_token_id
        )
        self._device = model.get_input_embeddings().weight.device
        with torch.inference_mode():
            images = features.of(row.images).to(self._device)
            row = row.to(self._device)
            embeddings = place_features(
                model, processor.family, row.input_ids, images, row.image_positions,
                row.feature_rows,
            )  # fmt: skip
            language = model.get_submodule(processor.family.parts.language)
            cache = _run(language, row, embeddings, chunk or CHUNK[self._device.type])
        self._states = [(layer.keys, layer.values) for layer in cache.layers]

    def inputs(self, numbers: Sequence[int]) -> dict[str, Any]:
        """What ``generate`` takes for some of the prompts: ids and mask (B, T), and their cache."""
        padded = self._processor.padded([self._prompts[number] for number in numbers])
        length = padded["input_ids"].shape[1] - 1
        # Padding stands for the first token of the row; nothing attends to it.
        places = torch.zeros(len(numbers), length, dtype=torch.int64)
        for row, number in enumerate(numbers):
            path = self._paths[number]
            places[row, length - len(path) :] = torch.tensor(path)
        places = places.to(self._device)
        cache = DynamicCache()
        cache.layers = [_RoomyLayer() for _ in self._states]
        for layer, states in enumerate(self._states):
            cache.update(*(_taken(state, places) for state in states), layer)
        del padded["labels"]
        return {**padded, CACHE: cache}


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in larger tensors, so that a new token does not copy those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: Any = None
        self.values: Any = None
        self._rooms: list[Tensor] = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See CacheLayerMixin; the room is kept, so that the next token copies nothing."""
        length = self.keys.shape[-2]
        self._rooms = [room.index_select(0, beam_idx) for room in self._rooms]
        self.keys, self.values = (room[:, :, :length] for room in self._rooms)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See DynamicLayer."""
        length = self.keys.shape[-2]
        self._rooms = [room.repeat_interleave(repeats, 0) for room in self._rooms]
        self.keys, self.values = (room[:, :, :length] for room in self._rooms)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See DynamicLayer: (B, K, n, d) new states -> all (B, K, T, d) of keys and of values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rooms = [self.keys, self.values]
        pairs = ((self.keys, key_states), (self.values, value_states))
        made = [_appended(room, *pair) for room, pair in zip(self._rooms, pairs, strict=True)]
        self._rooms = [room for room, _ in made]
        self.keys, self.values = (states for _, states in made)
        return self.keys, self.values


def _appended(room: Tensor, states: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """States with new ones behind them, in a room that is new if they are not in it or it is full.

    Returns:
        The room, (B, K, R, d), and the states in it, (B, K, T, d).
    """
    length = states.shape[-2] if states.numel() else 0
    end = length + new.shape[-2]
    if not length or states.data_ptr() != room.data_ptr() or end > room.shape[-2]:
        room = new.new_empty((*new.shape[:2], end + ROOM, new.shape[3]))
        if length:
            room[:, :, :length] = states
    room[:, :, length:end] = new
    return room, room[:, :, :end]


def _without_last(prompt: EncodedSample) -> EncodedSample:
    ids = prompt.input_ids[:-1]
    return replace(prompt, input_ids=ids, labels=torch.full_like(ids, IGNORE))


def _taken(states: Tensor, places: Tensor) -> Tensor:
    """(B, K, T, d) of the row's (1, K, N, d), at places (B, T)."""
    chosen = states[0].index_select(1, places.flatten())
    return chosen.view(len(chosen), *places.shape, -1).transpose(0, 1)


def _run(language: Any, row: PackedBatch, embeddings: Tensor, chunk: int) -> Any:
    """The cache of a row with these (1, N, D) input embeddings."""
    dtype, length = embeddings.dtype, len(row)
    fused = has_fused_attention(embeddings.device)
    whole = row_attention(row.segments, row.exit, dtype, fused=fused)
    # A dummy 4-D mask, so that transformers does not build its own.
    empty = torch.empty((1, 1, 0, 0), device=embeddings.device)
    cache = None
    with filling_the_cache(language):
        for first in range(0, length, chunk):
            places = torch.arange(first, min(first + chunk, length), device=embeddings.device)
            part = whole if chunk >= length else kept_attention(whole, places, row.exit, dtype)
            output = language(
                inputs_embeds=embeddings[:, places],
                attention_mask=empty,
                row=part,
                position_ids=row.position_ids[:, places],
                use_cache=True,
                **{CACHE: cache},
            )
            cache = output[CACHE]
    return cache
