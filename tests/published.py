"""The ten published checkpoints: their config.json and every tensor of their files.

Written from the authors' layout alone. Nothing of vlft is imported, and no shape is computed from
a config, so that a wrong default or a wrong name in vlft cannot hide here. Given golden sizes, the
builders reproduce names and shapes of all golden checkpoints.

    parts    merge, linear, norm, conv, count
    blocks   siglip, sam, hybrid, aligner, split_aligner, llama, deepseek, generation, vq
    models   vl_1b, vl_7b, vl2_tiny, vl2_small, vl2_base, janus_1b, janus_7b
    configs  VL_1B ... JANUS_7B: the fields that the files state; fields left to defaults are absent
    list     PUBLISHED
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Published:
    """A checkpoint of the hub.

    Attributes:
        name: hub id.
        config: config.json; shared between checkpoints of one size, so do not change it in place.
        tensors: lists every tensor of the files with its shape, also those never used.
        billions: elements of all those tensors / 1e9, rounded to 3 decimals.
    """

    name: str
    config: dict[str, Any]
    tensors: Callable[[], Shapes]
    billions: float


# Parts


def merge(*parts: Shapes) -> Shapes:
    """Union of parts that must not share a name."""
    union = {name: shape for part in parts for name, shape in part.items()}
    assert len(union) == sum(map(len, parts)), "two parts hold the same tensor"
    return union


def linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def conv(name: str, to: int, of: int, kernel: int, bias: bool = True) -> Shapes:
    weight = {f"{name}.weight": (to, of, kernel, kernel)}
    return weight | ({f"{name}.bias": (to,)} if bias else {})


def count(tensors: Shapes) -> int:
    """Elements of all tensors."""
    return sum(map(prod, tensors.values()))


# Vision towers


def siglip(name: str, width: int, layers: int, patch: int, grid: int, mlp: int) -> Shapes:
    """A SigLIP tower with the pooling head that none of the models uses; grid in patches a side."""
    return merge(
        {f"{name}.pos_embed": (1, grid * grid, width)},
        conv(f"{name}.patch_embed.proj", width, 3, patch),
        *(siglip_block(f"{name}.blocks.{i}", width, mlp) for i in range(layers)),
        norm(f"{name}.norm", width),
        attention_pool(f"{name}.attn_pool", width, mlp),
    )


def siglip_block(name: str, width: int, mlp: int) -> Shapes:
    return merge(
        norm(f"{name}.norm1", width),
        norm(f"{name}.norm2", width),
        linear(f"{name}.attn.qkv", 3 * width, width),
        linear(f"{name}.attn.proj", width, width),
        linear(f"{name}.mlp.fc1", mlp, width),
        linear(f"{name}.mlp.fc2", width, mlp),
    )


def attention_pool(name: str, width: int, mlp: int) -> Shapes:
    return merge(
        {f"{name}.latent": (1, 1, width)},
        linear(f"{name}.q", width, width),
        linear(f"{name}.kv", 2 * width, width),
        linear(f"{name}.proj", width, width),
        norm(f"{name}.norm", width),
        linear(f"{name}.mlp.fc1", mlp, width),
        linear(f"{name}.mlp.fc2", width, mlp),
    )


def sam(
    name: str,
    width: int,
    layers: int,
    grid: int,
    whole: tuple[int, ...],
    neck: int,
    down: tuple[int, int],
) -> Shapes:
    """SAM with 12 heads, patch 16, windows of 14, and the high-resolution additions.

    Args:
        name: prefix.
        width: of the blocks.
        layers: number of blocks.
        grid: patches a side.
        whole: indices of the blocks that attend to the whole grid.
        neck: channels behind the necks.
        down: channels behind the two strided convolutions.
    """
    sides = [grid if i in whole else 14 for i in range(layers)]
    return merge(
        {f"{name}.pos_embed": (1, grid, grid, width), f"{name}.hd_alpha_downsamples": (1,)},
        conv(f"{name}.patch_embed.proj", width, 3, 16),
        *(sam_block(f"{name}.blocks.{i}", width, side) for i, side in enumerate(sides)),
        sam_neck(f"{name}.neck", width, neck),
        sam_neck(f"{name}.neck_hd", width, neck),
        conv(f"{name}.downsamples.0", down[0], neck, 3, bias=False),
        conv(f"{name}.downsamples.1", down[1], down[0], 3, bias=False),
    )


def sam_block(name: str, width: int, side: int) -> Shapes:
    positions = (2 * side - 1, width // 12)
    return merge(
        norm(f"{name}.norm1", width),
        norm(f"{name}.norm2", width),
        linear(f"{name}.attn.qkv", 3 * width, width),
        linear(f"{name}.attn.proj", width, width),
        {f"{name}.attn.rel_pos_h": positions, f"{name}.attn.rel_pos_w": positions},
        linear(f"{name}.mlp.lin1", 4 * width, width),
        linear(f"{name}.mlp.lin2", width, 4 * width),
    )


def sam_neck(name: str, width: int, neck: int) -> Shapes:
    return merge(
        conv(f"{name}.0", neck, width, 1, bias=False),
        norm(f"{name}.1", neck),
        conv(f"{name}.2", neck, neck, 3, bias=False),
        norm(f"{name}.3", neck),
    )


def hybrid(
    high: Callable[[str], Shapes], low: Callable[[str], Shapes], high_width: int, low_width: int
) -> Shapes:
    """Both towers, and the two norms behind them that are never used."""
    return merge(
        high("vision_model.vision_tower_high.vision_tower"),
        low("vision_model.vision_tower_low.vision_tower"),
        norm("vision_model.high_layer_norm", high_width),
        norm("vision_model.low_layer_norm", low_width),
    )


# Aligners


def aligner(name: str, of: int, to: int) -> Shapes:
    """Linear, GELU, linear."""
    return merge(linear(f"{name}.layers.0", to, of), linear(f"{name}.layers.2", to, to))


def split_aligner(of: int, to: int) -> Shapes:
    """A projection to half the width for each tower, GELU, linear."""
    return merge(
        linear("aligner.high_up_proj", to // 2, of),
        linear("aligner.low_up_proj", to // 2, of),
        linear("aligner.layers.1", to, to),
    )


# Language models


def llama(width: int, layers: int, inner: int, vocabulary: int) -> Shapes:
    """The language model of DeepSeek-VL and Janus: as many key heads as query heads."""
    blocks = [f"language_model.model.layers.{i}" for i in range(layers)]
    return merge(
        text_ends("language_model", width, vocabulary),
        *(text_norms(block, width) for block in blocks),
        *(mha(f"{block}.self_attn", width) for block in blocks),
        *(gated_mlp(f"{block}.mlp", width, inner) for block in blocks),
    )


def deepseek(
    width: int,
    layers: int,
    vocabulary: int,
    attention: Callable[[str, int], Shapes],
    inner: int,
    experts: Callable[[str, int], Shapes],
) -> Shapes:
    """The language model of DeepSeek-VL2: the first block dense, all others with experts.

    Args:
        width: of the residual stream.
        layers: number of blocks.
        vocabulary: rows of the embedding.
        attention: `mha`, or `mla` with its sizes bound.
        inner: width of the dense MLP.
        experts: `mixture` with its sizes bound.
    """
    blocks = [f"language.model.layers.{i}" for i in range(layers)]
    return merge(
        text_ends("language", width, vocabulary),
        *(text_norms(block, width) for block in blocks),
        *(attention(f"{block}.self_attn", width) for block in blocks),
        gated_mlp(f"{blocks[0]}.mlp", width, inner),
        *(experts(f"{block}.mlp", width) for block in blocks[1:]),
    )


def text_ends(name: str, width: int, vocabulary: int) -> Shapes:
    return {
        f"{name}.model.embed_tokens.weight": (vocabulary, width),
        f"{name}.model.norm.weight": (width,),
        f"{name}.lm_head.weight": (vocabulary, width),
    }


def text_norms(name: str, width: int) -> Shapes:
    return {
        f"{name}.input_layernorm.weight": (width,),
        f"{name}.post_attention_layernorm.weight": (width,),
    }


def mha(name: str, width: int) -> Shapes:
    return merge(*(linear(f"{name}.{part}_proj", width, width, bias=False) for part in "qkvo"))


def mla(
    name: str, width: int, *, heads: int, plain: int, rope: int, value: int, rank: int
) -> Shapes:
    """Attention over compressed keys and values, with an uncompressed query projection."""
    return merge(
        linear(f"{name}.q_proj", heads * (plain + rope), width, bias=False),
        linear(f"{name}.kv_a_proj_with_mqa", rank + rope, width, bias=False),
        {f"{name}.kv_a_layernorm.weight": (rank,)},
        linear(f"{name}.kv_b_proj", heads * (plain + value), rank, bias=False),
        linear(f"{name}.o_proj", width, heads * value, bias=False),
    )


def gated_mlp(name: str, width: int, inner: int) -> Shapes:
    return merge(
        linear(f"{name}.gate_proj", inner, width, bias=False),
        linear(f"{name}.up_proj", inner, width, bias=False),
        linear(f"{name}.down_proj", width, inner, bias=False),
    )


def mixture(
    name: str, width: int, *, experts: int, inner: int, shared: int, corrected: bool = False
) -> Shapes:
    """Router, routed experts and shared experts (one MLP); corrected: with a selection bias."""
    gate: Shapes = {f"{name}.gate.weight": (experts, width)}
    if corrected:
        gate[f"{name}.gate.e_score_correction_bias"] = (experts,)
    return merge(
        gate,
        *(gated_mlp(f"{name}.experts.{e}", width, inner) for e in range(experts)),
        gated_mlp(f"{name}.shared_experts", width, shared * inner),
    )


# Image tokens of Janus


def vq(base: int, multipliers: tuple[int, ...], latent: int, codes: int, code: int) -> Shapes:
    """The VQ model; two residual blocks a level in the encoder, three in the decoder."""
    name = "gen_vision_model"
    widths = [base * multiplier for multiplier in multipliers]
    return merge(
        vq_encoder(f"{name}.encoder", widths, base, latent),
        vq_decoder(f"{name}.decoder", widths, latent),
        conv(f"{name}.quant_conv", code, latent, 1),
        conv(f"{name}.post_quant_conv", latent, code, 1),
        {f"{name}.quantize.embedding.weight": (codes, code)},
        {f"{name}.quantize.codebook_used": (65536,)},
    )


def vq_encoder(name: str, widths: list[int], base: int, latent: int) -> Shapes:
    """From the highest resolution down; widths[-1] is that of the lowest."""
    low = widths[-1]
    levels = [f"{name}.conv_blocks.{i}" for i in range(len(widths))]
    steps = zip(levels, [base, *widths], widths, strict=False)
    return merge(
        conv(f"{name}.conv_in", base, 3, 3),
        *(residuals(f"{level}.res", to, of, 2) for level, of, to in steps),
        *(pixel_attention(f"{levels[-1]}.attn.{j}", low) for j in range(2)),
        *(
            conv(f"{level}.downsample.conv", width, width, 3)
            for level, width in zip(levels[:-1], widths, strict=False)
        ),
        vq_middle(f"{name}.mid", low),
        norm(f"{name}.norm_out", low),
        conv(f"{name}.conv_out", latent, low, 3),
    )


def vq_decoder(name: str, widths: list[int], latent: int) -> Shapes:
    """From the lowest resolution up; widths[-1] is that of the lowest."""
    low, high = widths[-1], widths[0]
    upwards = widths[::-1]
    levels = [f"{name}.conv_blocks.{i}" for i in range(len(widths))]
    steps = zip(levels, [low, *upwards], upwards, strict=False)
    return merge(
        conv(f"{name}.conv_in", low, latent, 3),
        vq_middle(f"{name}.mid", low),
        *(residuals(f"{level}.res", to, of, 3) for level, of, to in steps),
        *(pixel_attention(f"{levels[0]}.attn.{j}", low) for j in range(3)),
        *(
            conv(f"{level}.upsample.conv", width, width, 3)
            for level, width in zip(levels[:-1], upwards, strict=False)
        ),
        norm(f"{name}.norm_out", high),
        conv(f"{name}.conv_out", 3, high, 3),
    )


def vq_middle(name: str, width: int) -> Shapes:
    return merge(
        residual(f"{name}.0", width, width),
        pixel_attention(f"{name}.1", width),
        residual(f"{name}.2", width, width),
    )


def residuals(name: str, to: int, of: int, number: int) -> Shapes:
    """Residual blocks of a level; the first changes the width."""
    rest = (residual(f"{name}.{j}", to, to) for j in range(1, number))
    return merge(residual(f"{name}.0", to, of), *rest)


def residual(name: str, to: int, of: int) -> Shapes:
    return merge(
        norm(f"{name}.norm1", of),
        conv(f"{name}.conv1", to, of, 3),
        norm(f"{name}.norm2", to),
        conv(f"{name}.conv2", to, to, 3),
        conv(f"{name}.nin_shortcut", to, of, 1) if to != of else {},
    )


def pixel_attention(name: str, width: int) -> Shapes:
    parts = ("q", "k", "v", "proj_out")
    convolutions = (conv(f"{name}.{part}", width, width, 1) for part in parts)
    return merge(norm(f"{name}.norm", width), *convolutions)


def generation(width: int, codes: int, code: int, embed: int) -> Shapes:
    """What Janus has around the VQ model: embedding, aligner and head of image tokens."""
    return merge(
        {"gen_embed.weight": (codes, code)},
        aligner("gen_aligner", code, width),
        linear("gen_head.output_mlp_projector", embed, width),
        linear("gen_head.vision_head", codes, embed),
    )


# The published models

VOCABULARY = 102400
VL2_VOCABULARY = 129280


def siglip_large(name: str) -> Shapes:
    """siglip_large_patch16_384."""
    return siglip(name, 1024, layers=24, patch=16, grid=24, mlp=4096)


def sam_b(name: str) -> Shapes:
    """sam_b_downsample at 1024 pixels."""
    return sam(name, 768, layers=12, grid=64, whole=(2, 5, 8, 11), neck=256, down=(512, 1024))


def vl_1b() -> Shapes:
    return merge(
        siglip_large("vision_model.vision_tower"),
        aligner("aligner", 1024, 2048),
        llama(2048, layers=24, inner=5632, vocabulary=VOCABULARY),
    )


def vl_7b() -> Shapes:
    return merge(
        hybrid(sam_b, siglip_large, high_width=1024, low_width=1024),
        split_aligner(1024, 4096),
        llama(4096, layers=30, inner=11008, vocabulary=VOCABULARY),
    )


def janus_1b() -> Shapes:
    return merge(
        vl_1b(),
        generation(2048, codes=16384, code=8, embed=2048),
        vq(128, (1, 1, 2, 2, 4), latent=256, codes=16384, code=8),
    )


def janus_7b() -> Shapes:
    return merge(
        siglip_large("vision_model.vision_tower"),
        aligner("aligner", 1024, 4096),
        llama(4096, layers=30, inner=11008, vocabulary=VOCABULARY),
        generation(4096, codes=16384, code=8, embed=4096),
        vq(128, (1, 1, 2, 2, 4), latent=256, codes=16384, code=8),
    )


def siglip_so400m(name: str) -> Shapes:
    """siglip_so400m_patch14_384; 384 pixels hold 27 whole patches."""
    return siglip(name, 1152, layers=27, patch=14, grid=27, mlp=4304)


def vl2(width: int, text: Shapes, tower: Shapes, tower_width: int) -> Shapes:
    """Tower, projector of 2x2 merged patches, the two separators (spelt so), and the text."""
    return merge(
        tower,
        aligner("projector", 4 * tower_width, width),
        {"image_newline": (width,), "view_seperator": (width,)},
        text,
    )


def vl2_tiny() -> Shapes:
    experts = partial(mixture, experts=64, inner=896, shared=2)
    text = deepseek(1280, 12, VL2_VOCABULARY, mha, 6848, experts)
    return vl2(1280, text, siglip_so400m("vision"), 1152)


def vl2_small() -> Shapes:
    attention = partial(mla, heads=16, plain=128, rope=64, value=128, rank=512)
    experts = partial(mixture, experts=64, inner=1408, shared=2)
    text = deepseek(2048, 27, VOCABULARY, attention, 10944, experts)
    return vl2(2048, text, siglip_so400m("vision"), 1152)


def vl2_base() -> Shapes:
    attention = partial(mla, heads=32, plain=128, rope=64, value=128, rank=512)
    experts = partial(mixture, experts=72, inner=1536, shared=2, corrected=True)
    text = deepseek(2560, 30, VL2_VOCABULARY, attention, 12288, experts)
    return vl2(2560, text, siglip_so400m("vision"), 1152)


# Their config.json

MULTI_MODALITY = {"architectures": ["MultiModalityCausalLM"], "model_type": "multi_modality"}

SIGLIP_VISION = {
    "cls": "CLIPVisionTower",
    "params": {
        "image_size": 384,
        "model_name": "siglip_large_patch16_384",
        "select_feature": "same",
        "select_layer": -1,
    },
}

HYBRID_VISION = {
    "cls": "HybridVisionTower",
    "params": {
        "concat_type": "tuple",
        "high_res_cfg": {
            "ckpt_path": "",
            "image_size": 1024,
            "model_name": "sam_b_downsample",
            "output_dim": 1024,
            "pixel_mean": [0.48145466, 0.4578275, 0.40821073],
            "pixel_std": [0.26862954, 0.26130258, 0.27577711],
            "select_feature": "same",
            "select_layer": -1,
        },
        "low_res_cfg": {
            "image_size": 384,
            "model_name": "siglip_large_patch16_384",
            "output_dim": 1024,
            "pixel_mean": [0.5, 0.5, 0.5],
            "pixel_std": [0.5, 0.5, 0.5],
        },
    },
}

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 16384,
    "model_type": "llama",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "vocab_size": 102400,
}

# hidden_size 4096, intermediate_size 11008 and 32 heads are LlamaConfig's defaults.
LLAMA_7B = {
    "max_position_embeddings": 16384,
    "model_type": "llama",
    "num_hidden_layers": 30,
    "vocab_size": 102400,
}


def aligner_config(of: int, to: int, kind: str = "mlp_gelu") -> dict[str, Any]:
    params = {"depth": 2, "input_dim": of, "n_embed": to, "projector_type": kind}
    return {"cls": "MlpProjector", "params": params}


def janus_config(width: int, language: dict[str, Any]) -> dict[str, Any]:
    head = {"image_token_embed": width, "image_token_size": 16384, "n_embed": width}
    return MULTI_MODALITY | {
        "aligner_config": aligner_config(1024, width),
        "gen_aligner_config": aligner_config(8, width),
        "gen_head_config": {"cls": "vision_head", "params": head},
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
        "language_config": language,
        "vision_config": SIGLIP_VISION,
    }


VL_1B = MULTI_MODALITY | {
    "aligner_config": aligner_config(1024, 2048),
    "language_config": LLAMA_1B,
    "vision_config": SIGLIP_VISION,
}
VL_7B = MULTI_MODALITY | {
    "aligner_config": aligner_config(1024, 4096, "low_high_hybrid_split_mlp_gelu"),
    "language_config": LLAMA_7B,
    "vision_config": HYBRID_VISION,
}
JANUS_1B = janus_config(2048, LLAMA_1B)
JANUS_7B = janus_config(4096, LLAMA_7B)

# Width and height in tiles, in the order of the files.
TILES = "11 12 21 13 31 14 41 22 15 51 16 61 23 32 17 71 18 81 24 42 19 91 33"

# Stated in all three; the files that auto_map names are not in the repositories.
VL2_TEXT = {
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "first_k_dense_replace": 1,
    "lm_head": True,
    "max_position_embeddings": 4096,
    "n_group": 1,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "q_lora_rank": None,
    "rm_head": False,
    "topk_group": 1,
}


def vl2_config(width: int, text: dict[str, Any]) -> dict[str, Any]:
    """The rest of vision_config and projector_config is left to defaults."""
    return {
        "architectures": ["DeepseekVLV2ForCausalLM"],
        "candidate_resolutions": [[384 * int(side) for side in tile] for tile in TILES.split()],
        "global_view_pos": "head",
        "language_config": VL2_TEXT | {"hidden_size": width} | text,
        "model_type": "deepseek_vl_v2",
        "projector_config": {"n_embed": width},
        "tile_tag": "2D",
        "vision_config": {
            "layers": 27,
            "mlp_ratio": 3.7362,
            "model_name": "siglip_so400m_patch14_384",
            "patch_size": 14,
            "width": 1152,
        },
    }


VL2_TINY = vl2_config(
    1280,
    {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "intermediate_size": 6848,
        "kv_lora_rank": None,
        "moe_intermediate_size": 896,
        "n_routed_experts": 64,
        "num_attention_heads": 10,
        "num_hidden_layers": 12,
        "num_key_value_heads": 10,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "topk_method": "greedy",
        "use_mla": False,
        "v_head_dim": 0,
        "vocab_size": 129280,
    },
)
# use_mla, kv_lora_rank and the head sizes are left to defaults. By vllm-project/vllm#51302 the file
# lacks vocab_size, too; 102400 is its original default.
VL2_SMALL = vl2_config(
    2048,
    {
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "topk_method": "greedy",
    },
)
# As in small; 30 layers and 32 heads are left to defaults, too.
VL2_BASE = vl2_config(
    2560,
    {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 72,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "vocab_size": 129280,
    },
)

# The totals are what this file's own arithmetic gives.
PUBLISHED: tuple[Published, ...] = (
    Published("deepseek-ai/deepseek-vl-1.3b-base", VL_1B, vl_1b, 1.975),
    Published("deepseek-ai/deepseek-vl-1.3b-chat", VL_1B, vl_1b, 1.975),
    Published("deepseek-ai/deepseek-vl-7b-base", VL_7B, vl_7b, 7.344),
    Published("deepseek-ai/deepseek-vl-7b-chat", VL_7B, vl_7b, 7.344),
    Published("deepseek-ai/deepseek-vl2-tiny", VL2_TINY, vl2_tiny, 3.371),
    Published("deepseek-ai/deepseek-vl2-small", VL2_SMALL, vl2_small, 16.148),
    Published("deepseek-ai/deepseek-vl2", VL2_BASE, vl2_base, 27.48),
    Published("deepseek-ai/Janus-1.3B", JANUS_1B, janus_1b, 2.089),
    Published("deepseek-ai/Janus-Pro-1B", JANUS_1B, janus_1b, 2.089),
    Published("deepseek-ai/Janus-Pro-7B", JANUS_7B, janus_7b, 7.42),
)
