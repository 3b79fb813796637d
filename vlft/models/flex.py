"""FlexAttention over a packed row, registered with transformers as an attention implementation.

One kernel a layer computes the blocks of the mask that are not empty. Its code is made for one
length, so that queries, keys and values are padded to a few lengths; padding is a block of its own
and costs next to nothing.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import flex_attention_mask

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.nn.attention.flex_attention import BlockMask

# The name under which ``row_attention`` is registered with transformers.
FLEX = "vlft_flex"
# Rows below this many tokens are padded to it: each length costs a compilation, short rows little.
SHORTEST = 1024
# Versions of the code that torch keeps before it would compute all scores instead: two lengths in
# each doubling up to a million tokens, with and without gradients.
MOST_VERSIONS = 64


def padded_length(tokens: int) -> int:
    """The next of 1024, 1536, 2048, 3072, 4096, ... tokens."""
    length = SHORTEST
    while length < tokens:
        length *= 2
    shorter = 3 * length // 4
    return shorter if SHORTEST < tokens <= shorter else length


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    row: BlockMask | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """One kernel if the call carries the mask of a packed row, else transformers' FlexAttention.

    query (1, H, N, d), key (1, K, N, d), value (1, K, N, x) -> (1, N, H, x) and None in place of
    attention weights. The mask of the row is of its padded length. The signature is that of
    transformers' attention functions; attention_mask is for calls without a packed row.
    """
    if row is None:
        found: tuple[Tensor, Tensor | None] = flex_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return found
    tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    padding = (0, 0, 0, row.seq_lengths[0] - tokens)
    query, key, value = (
        F.pad(part, padding) for part in (query, repeat_kv(key, groups), repeat_kv(value, groups))
    )
    attended: Tensor = compiled()(query, key, value, block_mask=row, scale=scaling)
    return attended[:, :, :tokens].transpose(1, 2).contiguous(), None


AttentionInterface.register(FLEX, row_attention)
AttentionMaskInterface.register(FLEX, flex_attention_mask)


@functools.cache
def compiled() -> Callable[..., Any]:
    """FlexAttention, compiled for each length that it meets."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_VERSIONS)
    return torch.compile(flex_attention, dynamic=False)
