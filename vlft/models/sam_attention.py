"""The SAM tower's attention over the whole image, one head after the other.

Its relative positions are a bias of all queries by all keys, which for an image of 1,024 pixels is
16.8 million numbers a head. transformers makes those of all heads at once, and passes on a copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

if TYPE_CHECKING:
    from torch import Tensor


class HeadByHead(SamVisionSdpaAttention):
    """The same numbers."""

    def forward(self, hidden_states: Tensor, output_attentions: Any = None) -> tuple[Tensor, None]:  # noqa: ARG002
        """(B, H, W, D) -> (B, H, W, D), and None."""
        batch, height, width, _ = hidden_states.shape
        size = (height, width)
        projected = self.qkv(hidden_states).view(
            batch, height * width, 3, self.num_attention_heads, -1
        )
        heads = []
        for query, key, value in zip(*projected.permute(2, 3, 0, 1, 4), strict=True):
            bias = None
            if self.use_rel_pos:
                positions = self.rel_pos_h, self.rel_pos_w
                bias = self.get_decomposed_rel_pos(query, *positions, size, size)
                bias = bias.reshape(batch, 1, height * width, height * width)
            # Fused kernels want a dimension of heads.
            query, key, value = (part.unsqueeze(1) for part in (query, key, value))
            heads.append(F.scaled_dot_product_attention(query, key, value, attn_mask=bias))
        attended = torch.cat(heads, 1).transpose(1, 2)
        return self.proj(attended.reshape(batch, height, width, -1)), None


def attend_head_by_head(tower: Any) -> None:
    """Has a SAM tower's layers that see the whole image do so; windows are small."""
    for layer in tower.layers:
        if layer.window_size == 0 and type(layer.attn) is SamVisionSdpaAttention:
            layer.attn.__class__ = HeadByHead
