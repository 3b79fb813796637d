"""The published checkpoints: plain facts, which the tests compare with the models themselves."""

from __future__ import annotations

from dataclasses import dataclass

from vlft.planning.sizes import ExpertSizes, LatentSizes, TextSizes


@dataclass(frozen=True)
class PublishedModel:
    """A checkpoint on the hub.

    Attributes:
        id: owner/name.
        family: name of its family.
        billions: parameters in its files, in 1e9.
        image_tokens: fewest and most tokens that an image becomes.
        text: sizes of the LLM.
        sam_scores: see planning.sizes.
    """

    id: str
    family: str
    billions: float
    image_tokens: tuple[int, int]
    text: TextSizes
    sam_scores: int = 0


_LLAMA_1B = TextSizes(102400, 2048, 5632, layers=24, heads=16, kv_heads=16, head_dim=128)
_LLAMA_7B = TextSizes(102400, 4096, 11008, layers=30, heads=32, kv_heads=32, head_dim=128)
_LATENT = LatentSizes(
    kv_lora_rank=512, q_lora_rank=0, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
)
_VL2_TINY = TextSizes(
    129280, 1280, 6848, layers=12, heads=10, kv_heads=10, head_dim=128,
    experts=ExpertSizes(64, 6, 2, intermediate_size=896, dense_layers=1, router_bias=False),
)  # fmt: skip
_VL2_SMALL = TextSizes(
    102400, 2048, 10944, layers=27, heads=16, kv_heads=16, head_dim=128, latent=_LATENT,
    experts=ExpertSizes(64, 6, 2, intermediate_size=1408, dense_layers=1, router_bias=False),
)  # fmt: skip
_VL2_BASE = TextSizes(
    129280, 2560, 12288, layers=30, heads=32, kv_heads=32, head_dim=80, latent=_LATENT,
    experts=ExpertSizes(72, 6, 2, intermediate_size=1536, dense_layers=1, router_bias=True),
)  # fmt: skip


def _row(name: str, family: str, text: TextSizes, billions: float, *tokens: int) -> PublishedModel:
    # Attention over 64 x 64 patches.
    scores = 64**4 if family == "deepseek_vl_hybrid" else 0
    hub_id = f"deepseek-ai/{name}"
    return PublishedModel(hub_id, family, billions, (tokens[0], tokens[-1]), text, scores)


PUBLISHED_MODELS: tuple[PublishedModel, ...] = (
    _row("deepseek-vl-1.3b-base", "deepseek_vl", _LLAMA_1B, 1.98, 576),
    _row("deepseek-vl-1.3b-chat", "deepseek_vl", _LLAMA_1B, 1.98, 576),
    _row("deepseek-vl-7b-base", "deepseek_vl_hybrid", _LLAMA_7B, 7.34, 576),
    _row("deepseek-vl-7b-chat", "deepseek_vl_hybrid", _LLAMA_7B, 7.34, 576),
    _row("deepseek-vl2-tiny", "deepseek_vl2", _VL2_TINY, 3.37, 421, 2101),
    _row("deepseek-vl2-small", "deepseek_vl2", _VL2_SMALL, 16.15, 421, 2101),
    _row("deepseek-vl2", "deepseek_vl2", _VL2_BASE, 27.48, 421, 2101),
    _row("Janus-1.3B", "janus", _LLAMA_1B, 2.09, 576),
    _row("Janus-Pro-1B", "janus", _LLAMA_1B, 2.09, 576),
    _row("Janus-Pro-7B", "janus", _LLAMA_7B, 7.42, 576),
)
