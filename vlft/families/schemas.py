"""Schemas of a model's small files, of all families and both layouts: a name has one meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlft.schema import (
    BOOL,
    OBJECT,
    TEXT,
    TEXTS,
    UTF8_TEXT,
    Rule,
    Schema,
    either,
    many,
    number,
    table,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

WIDTH = whole(1, 2**17)
LAYERS = whole(1, 256)
HEADS = whole(1, 1024)
SIDE = whole(1, 8192)
EPSILON = number(0, 1)
# Published tokenizers have 129,280 tokens, codebooks of drawing 16,384 codes.
ROWS = whole(1, 2**21)
TOKEN = either(UTF8_TEXT, table(either(UTF8_TEXT, BOOL)))


def _each(rule: Rule, *names: str) -> Mapping[str, Rule]:
    return dict.fromkeys(names, rule)


CONFIG: Schema = {
    **_each(
        OBJECT, "language_config", "text_config", "vision_config", "aligner_config", "params",
        "high_res_cfg", "low_res_cfg", "high_res_vision_config", "projector_config", "vq_config",
        "gen_vision_config", "gen_aligner_config", "gen_head_config", "rope_scaling",
        "rope_parameters",
    ),
    **_each(
        TEXT, "model_type", "cls", "model_name", "projector_type", "hidden_act", "topk_method",
        "scoring_func", "tile_tag", "global_view_pos", "torch_dtype", "dtype",
        "transformers_version", "rope_type",
    ),
    **_each(
        WIDTH, "hidden_size", "intermediate_size", "moe_intermediate_size", "input_dim", "n_embed",
        "output_dim", "output_channels", "prompt_embed_dim", "mlp_dim", "projection_dim",
        "image_token_embed", "image_token_embed_dim", "embed_dim", "latent_channels",
        "base_channels", "ch", "z_channels", "kv_lora_rank", "q_lora_rank",
    ),
    **_each(LAYERS, "num_hidden_layers", "layers", "num_res_blocks"),
    **_each(HEADS, "num_attention_heads", "num_key_value_heads", "heads"),
    **_each(whole(0, 4096), "head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    **_each(whole(0, 2048), "n_routed_experts", "n_shared_experts"),
    **_each(whole(1, 2048), "num_experts_per_tok", "n_group", "topk_group"),
    **_each(SIDE, "image_size", "patch_size", "window_size"),
    **_each(ROWS, "vocab_size", "image_token_size", "num_embeddings"),
    **_each(EPSILON, "rms_norm_eps", "layer_norm_eps", "initializer_range"),
    **_each(
        BOOL, "tie_word_embeddings", "attention_bias", "mlp_bias", "norm_topk_prob", "use_mla",
        "qkv_bias", "use_abs_pos", "use_rel_pos", "vision_use_head", "use_qk_norm",
        "token_pooling", "double_latent",
    ),
    **_each(many(whole(1, 2**17), 1, 16), "downsample_channels", "channel_multiplier", "ch_mult"),
    **_each(many(number(0, 1), 3, 3), "pixel_mean"),
    **_each(many(number(1e-6, 1e6), 3, 3), "pixel_std"),
    # A number, or in DeepSeek-OCR an object of sizes by the name of a tower.
    "width": either(WIDTH, OBJECT),
    "dim": WIDTH,
    "architectures": TEXTS,
    "candidate_resolutions": many(many(whole(1, 2**16), 2, 2), 0, 1000),
    "depth": whole(1, 64),
    "downsample_ratio": whole(1, 64),
    "first_k_dense_replace": whole(0, 256),
    "global_attn_indexes": many(whole(0, 255), 0, 256),
    "image_token_id": whole(0, 2**21),
    "max_position_embeddings": whole(1, 2**24),
    "mlp_ratio": number(1e-3, 64),
    "num_channels": whole(3, 3),
    "in_channels": whole(3, 3),
    "out_channels": whole(3, 3),
    "num_image_tokens": whole(1, 2**16),
    "rope_theta": number(1, 1e12),
    "routed_scaling_factor": number(0, 1e6),
    **_each(TEXTS, "layer_types", "mlp_layer_types"),
    **_each(whole(1, 2**24), "sliding_window", "sliding_window_size"),
}  # fmt: skip

# Of preprocessor_config.json and processor_config.json.
PROCESSOR: Schema = {
    **_each(many(number(0, 1), 3, 3), "image_mean", "high_res_image_mean"),
    **_each(many(number(1e-6, 1e6), 3, 3), "image_std", "high_res_image_std"),
    **_each(BOOL, "do_normalize", "normalize"),
    "candidate_resolutions": CONFIG["candidate_resolutions"],
    "exif": TEXT,
    "image_mode": TEXT,
    "max_tiles": whole(1, 1000),
    "max_image_tokens": whole(1, 2**24),
    "min_size": SIDE,
    "num_image_tokens": CONFIG["num_image_tokens"],
    "rescale_factor": number(1e-9, 1e6),
}

# Of tokenizer_config.json and special_tokens_map.json.
TOKENS: Schema = {
    **_each(TOKEN, "bos_token", "eos_token", "pad_token"),
    "chat_template": either(UTF8_TEXT, many(OBJECT)),
}
