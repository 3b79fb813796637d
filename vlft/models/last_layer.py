"""The LLM's last layer, made to stop at the positions whose hidden states are used.

Below it every token is looked at by others; after its attention no token is. Tuned on images,
nine tokens of ten have no target: their last feed-forward layer would be for nothing.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def narrow_last_layer(language: Any) -> None:
    """Makes the LLM give hidden states of wanted positions alone, if told which.

    ``language(..., wanted=positions)``, (S,) int64, then returns (1, S, D); without ``wanted`` it
    is what it was. Positions may repeat. With checkpointing this layer keeps what the backward pass
    needs: that comes next, so that computing it again would spare nothing.

    Args:
        language: transformers' decoder, its layers of Llama's form.
    """
    layer = language.layers[-1]
    layer.forward = partial(_forward, layer, layer.forward)


def _forward(
    layer: Any, plain: Any, hidden: Tensor, *, wanted: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """(1, N, D) -> (1, S, D)."""
    if wanted is None:
        found: Tensor = plain(hidden, **kwargs)
        return found
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)
    # Not by indexing, which on the CPU adds gradients of a repeated position up in any order.
    hidden = (hidden + attended).index_select(1, wanted)
    result: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return result
