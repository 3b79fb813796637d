"""The LLM's last layer for some positions alone, or for its cache alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextAttention
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    apply_rotary_emb,
)
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrTextAttention

from vlft.models.cache_name import CACHE
from vlft.models.tree_attention import tree_attention

if TYPE_CHECKING:
    from vlft.models.tree_attention import BlockAttention

# Queries (1, H, S, d) of S positions, keys (1, K, N, d) and values (1, K, N, x) of N.
States: TypeAlias = tuple[Tensor, Tensor, Tensor]

# They project, rotate and divide into heads as Llama does.
_AS_LLAMA = (LlamaAttention, UnlimitedOcrTextAttention, DeepseekOcr2TextAttention)


def can_narrow(attention: nn.Module) -> bool:
    """Whether ``narrowed_attention`` knows how this class makes queries, keys and values."""
    return isinstance(attention, (*_AS_LLAMA, DeepseekV2Attention))


def narrowed_forward(
    layer: Any,
    hidden: Tensor,
    *,
    positions_to_keep: Tensor | None = None,
    kept_row: tuple[BlockAttention, ...] | None = None,
    **kwargs: Any,
) -> Tensor:
    """(1, N, D) -> (1, S, D), or (1, N, D) if no positions are given."""
    if positions_to_keep is None:
        usual: Tensor = type(layer).forward(layer, hidden, **kwargs)
        return usual
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    # Not by indexing, whose gradient adds up repeated positions in no fixed order on the CPU.
    kept = hidden.index_select(1, positions_to_keep)
    if kept_row is not None and can_narrow(attention):
        rotations = kwargs["position_embeddings"]
        attended = narrowed_attention(attention, normed, positions_to_keep, rotations, kept_row)
    else:
        attended, _ = attention(hidden_states=normed, **kwargs)
        attended = attended.index_select(1, positions_to_keep)
    hidden = kept + attended
    result: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return result


def cached_forward(
    layer: Any, hidden: Tensor, *, position_embeddings: Any, **kwargs: Any
) -> Tensor:
    """(1, N, D) -> (1, 0, D); the layer's cache takes the states of all N."""
    attention = layer.self_attn
    states = cached_states(attention, layer.input_layernorm(hidden), position_embeddings)
    kwargs[CACHE].update(*states, attention.layer_idx)
    return hidden[:, :0]


def narrowed_attention(
    attention: Any,
    hidden: Tensor,
    positions: Tensor,
    rotations: Any,
    row: tuple[BlockAttention, ...],
) -> Tensor:
    """The output of an attention module at some positions, which attend to all of the row.

    Args:
        attention: of a class for which ``can_narrow`` holds.
        hidden: (1, N, D), its input.
        positions: (S,) int64, ascending; they may repeat.
        rotations: the position embeddings that the module takes.
        row: packing.attention.kept_attention of these positions.

    Returns:
        (1, S, D).
    """
    kept = hidden.index_select(1, positions)
    states = _latent_states if isinstance(attention, DeepseekV2Attention) else _states
    query, key, value = states(attention, kept, hidden, positions, rotations)
    output, _ = tree_attention(
        attention, query, key, value, None, row=row, scaling=attention.scaling
    )
    projected: Tensor = attention.o_proj(output.flatten(2))
    return projected


def cached_states(attention: Any, hidden: Tensor, rotations: Any) -> tuple[Tensor, Tensor]:
    """What an attention module adds to its cache for an input, without its queries and output.

    Args:
        attention: of a class for which ``can_narrow`` holds.
        hidden: (1, N, D), its input.
        rotations: the position embeddings that the module takes.

    Returns:
        Keys (1, K, N, d) and values (1, K, N, x); of latent attention what they are made of.
    """
    if isinstance(attention, DeepseekV2Attention):
        return _latents(attention, hidden, rotations)
    return _keys_and_values(attention, hidden, rotations)


def _states(
    attention: Any, kept: Tensor, hidden: Tensor, positions: Tensor, rotations: tuple[Tensor, ...]
) -> States:
    """As Llama's: cosines and sines are (1, N, d)."""
    query = attention.q_proj(kept).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    # The function rotates two tensors of the same positions; one head stands for the other.
    of_kept = (rotation.index_select(1, positions) for rotation in rotations)
    query, _ = apply_rotary_pos_emb(query, query[:, :1], *of_kept)
    return query, *_keys_and_values(attention, hidden, rotations)


def _keys_and_values(
    attention: Any, hidden: Tensor, rotations: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    key, value = (
        projection(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.k_proj, attention.v_proj)
    )
    key, _ = apply_rotary_pos_emb(key, key[:, :1], *rotations)
    return key, value


def _latent_states(
    attention: Any, kept: Tensor, hidden: Tensor, positions: Tensor, rotations: Tensor
) -> States:
    """As DeepSeek-V2's latent attention: complex rotations are (1, N, e / 2)."""
    if attention.q_lora_rank is None:
        query = attention.q_proj(kept)
    else:
        query = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(kept)))
    query = query.unflatten(-1, (-1, attention.qk_head_dim)).transpose(1, 2)
    plain, rotated = query.split([attention.qk_nope_head_dim, attention.qk_rope_head_dim], -1)
    rotated, _ = apply_rotary_emb(rotated, rotated[:, :1], rotations.index_select(1, positions))
    keys, values = attention.expand_kv(*_latents(attention, hidden, rotations))
    return torch.cat((plain, rotated), -1), keys, values


def _latents(attention: Any, hidden: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (1, 1, N, r) of keys and values, and the rotated part (1, 1, N, e) of all keys."""
    latent, key = (
        attention.kv_a_proj_with_mqa(hidden)
        .unsqueeze(1)
        .split([attention.kv_lora_rank, attention.qk_rope_head_dim], -1)
    )
    key, _ = apply_rotary_emb(key, key, rotations)
    return attention.kv_a_layernorm(latent), key
