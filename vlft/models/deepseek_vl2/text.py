"""The LLM of DeepSeek-VL2: transformers' DeepSeek-V2 layers with its own attention and routing."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2DecoderLayer,
    DeepseekV2MLP,
    DeepseekV2Model,
    DeepseekV2Moe,
    DeepseekV2PreTrainedModel,
    DeepseekV2RMSNorm,
    DeepseekV2RotaryEmbedding,
    DeepseekV2TopkRouter,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from vlft.models.deepseek_vl2.configuration import DeepseekVL2TextConfig


class Router(DeepseekV2TopkRouter):
    """Selects top_k of E experts for each token, in float32 whatever the model's dtype.

    greedy                top k of the scores
    group_limited_greedy  the same within topk_group groups, ranked by their largest score
    noaux_tc              top k of score + correction bias within topk_group groups, ranked by the
                          sum of their two largest; the bias takes part in the selection, not in
                          the weights (https://arxiv.org/abs/2412.19437)
    """

    def __init__(self, config: DeepseekVL2TextConfig) -> None:
        super().__init__(config)
        self.config = config
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = nn.Parameter(torch.empty(config.n_routed_experts))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D) hidden states -> (N, E) logits, (N, k) weights, (N, k) expert indices."""
        config = self.config
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden.float(), self.weight.float())
        softmax = config.scoring_func == "softmax"
        scores = logits.softmax(-1) if softmax else logits.sigmoid()
        ranked = scores
        if config.topk_method == "noaux_tc":
            ranked = self._mask_groups(scores + self.e_score_correction_bias.float(), largest=2)
        elif config.topk_method == "group_limited_greedy":
            # If these groups hold fewer than top_k experts, others are picked but get weight 0.
            ranked = scores = self._mask_groups(scores, largest=1)
        top_k = cast(int, config.num_experts_per_tok)
        top_k_index = ranked.topk(top_k, dim=-1, sorted=False).indices
        weights = scores.gather(-1, top_k_index)
        if config.norm_topk_prob and top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * config.routed_scaling_factor, top_k_index

    def _mask_groups(self, scores: Tensor, largest: int) -> Tensor:
        """(N, E) scores, zero outside of the topk_group groups with the largest scores.

        The score of a group is the sum of its ``largest`` largest ones.
        """
        grouped = scores.unflatten(-1, (self.config.n_group or 1, -1))
        group_scores = grouped.topk(largest, dim=-1).values.sum(-1)
        selected = group_scores.topk(self.config.topk_group or 1, dim=-1).indices
        mask = torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, selected, value=True)
        masked: Tensor = grouped.masked_fill(~mask.unsqueeze(-1), 0.0).flatten(-2)
        return masked


class SparseMLP(DeepseekV2Moe):
    """DeepSeek-V2's routed and shared experts, with the router above."""

    def __init__(self, config: DeepseekVL2TextConfig) -> None:
        super().__init__(config)
        self.gate = Router(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        # The parent's forward sums the three gradients of ``hidden`` in another order.
        flat = hidden.flatten(0, -2)
        _, weights, top_k_index = self.gate(flat)
        routed: Tensor = self.experts(flat, top_k_index, weights)
        total: Tensor = routed.view_as(hidden) + self.shared_experts(hidden)
        return total


class DecoderLayer(DeepseekV2DecoderLayer):
    """DeepSeek-V2's layer, with the attention and the MLP that the config states for it."""

    def __init__(self, config: DeepseekVL2TextConfig, layer_idx: int) -> None:
        GradientCheckpointingLayer.__init__(self)
        attention = DeepseekV2Attention if config.use_mla else LlamaAttention
        sparse = layer_idx >= config.first_k_dense_replace
        size, eps = config.hidden_size, config.rms_norm_eps
        self.hidden_size = size
        self.self_attn = attention(config, layer_idx)
        self.mlp = SparseMLP(config) if sparse else DeepseekV2MLP(config)
        self.input_layernorm = DeepseekV2RMSNorm(size, eps)
        self.post_attention_layernorm = DeepseekV2RMSNorm(size, eps)


class DeepseekVL2TextModel(DeepseekV2Model):
    """DeepSeek-V2's LLM with layers of the class above."""

    config: DeepseekVL2TextConfig
    config_class = DeepseekVL2TextConfig
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 (transformers' name and form)

    def __init__(self, config: DeepseekVL2TextConfig) -> None:
        DeepseekV2PreTrainedModel.__init__(self, config)
        rotary = DeepseekV2RotaryEmbedding if config.use_mla else LlamaRotaryEmbedding
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [DecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = DeepseekV2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = rotary(config)
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers would search this file for its decorator, and not find it

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, Router) and self.config.topk_method == "noaux_tc":
            nn.init.zeros_(module.e_score_correction_bias)
