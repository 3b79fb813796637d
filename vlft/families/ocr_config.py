"""config.json of DeepSeek-OCR, DeepSeek-OCR-2 and Unlimited-OCR, in both layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft.errors import CheckpointError
from vlft.families.base import known_fields

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlft.families.base import Config

# The authors' code has these sizes in its text; ``vision_config.width`` may state others.
SAM: Config = {
    "width": 768, "layers": 12, "heads": 12, "prompt_embed_dim": 256,
    "global_attn_indexes": [2, 5, 8, 11], "downsample_channels": [512, 1024],
}  # fmt: skip
# Defaults of the authors' DeepseekV2Config, where the published config.json is silent.
TEXT: Mapping[str, Any] = {
    "vocab_size": 129280, "hidden_size": 1280, "intermediate_size": 6848,
    "moe_intermediate_size": 896, "num_hidden_layers": 12, "num_attention_heads": 10,
    "num_key_value_heads": 10, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 8192, "hidden_act": "silu",
}  # fmt: skip
# What the classes of transformers compute; a config that states another value is refused.
FIXED: Mapping[str, Any] = {
    "use_mla": False, "norm_topk_prob": False, "scoring_func": "softmax", "rope_scaling": None,
    "attention_bias": False, "topk_method": "greedy",
}  # fmt: skip
# Fields of the authors' config without a meaning for this LLM, which has plain attention.
LEFTOVERS: Config = {
    "use_mla": False, "kv_lora_rank": None, "q_lora_rank": None, "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 0, "v_head_dim": 0, "lm_head": True, "rm_head": False,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
# Sizes of SAM in ``vision_config.width`` -> in the class's config.
SAM_NAMES: Mapping[str, str] = {
    "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "prompt_embed_dim": "output_channels", "global_attn_indexes": "global_attn_indexes",
    "downsample_channels": "downsample_channels",
}  # fmt: skip


# layer_types of the classes of transformers; Unlimited-OCR has the second in every layer.
FULL, WINDOWED = "full_attention", "reference_sliding_attention"
# Tokens of Unlimited-OCR's window, where its config does not say.
WINDOW = 128


def is_original(config: Config) -> bool:
    """Whether a config.json is of the authors' layout."""
    return "text_config" not in config


def window_of(config: Config) -> int | None:
    """The window of the replies (see packing.window) that a config.json of either layout states.

    None if replies attend to all tokens before.

    Raises:
        CheckpointError: some layers have one and others have not.
    """
    text = config.get("language_config" if is_original(config) else "text_config") or {}
    sizes = (
        group.get(n) for group in (text, config) for n in ("sliding_window_size", "sliding_window")
    )
    stated: int | None = next(filter(None, sizes), None)
    if is_original(config):
        by_name = str(config.get("model_type")).replace("-", "_") == "unlimited_ocr"
        return stated or (WINDOW if by_name else None)
    kinds = set(text.get("layer_types") or [WINDOWED])
    if len(kinds) > 1 or not kinds <= {FULL, WINDOWED}:
        raise CheckpointError(
            f"layer_types {', '.join(sorted(kinds))}",
            hint=f"allowed are {FULL} in all layers (DeepSeek-OCR), or {WINDOWED} in all of them "
            "(Unlimited-OCR)",
        )
    return (stated or WINDOW) if kinds == {WINDOWED} else None


def text_config(config: Config) -> dict[str, Any]:
    """Keyword arguments of the LLM's config, for config.json in either layout.

    Raises:
        CheckpointError: the class does not support it.
    """
    stated = dict(config["language_config"] if is_original(config) else config["text_config"])
    stated |= stated.get("rope_parameters") or {}
    for name, allowed in FIXED.items():
        if stated.get(name, allowed) not in (allowed, None):
            raise CheckpointError(f"{name} {stated[name]!r}", hint=f"supported is {allowed!r}")
    text = known_fields(stated, TEXT)
    layers, dense = text["num_hidden_layers"], stated.get("first_k_dense_replace", 1)
    kinds = ["dense"] * dense + ["sparse"] * (layers - dense)
    return {
        **text,
        "mlp_layer_types": stated.get("mlp_layer_types") or kinds,
        "tie_word_embeddings": False,
    }


def widths(config: Config, tower: str, usual: Config) -> dict[str, Any]:
    """The sizes of a tower: those that ``vision_config.width`` states, the usual ones otherwise."""
    stated = (config.get("vision_config") or {}).get("width") or {}
    return {**usual, **(stated.get(tower) or {})}


def sam_config(config: Config, last_channels: int | None = None) -> dict[str, Any]:
    """Keyword arguments of the SAM encoder's config, for config.json in either layout.

    ``last_channels`` replaces the last of the stated downsample_channels.
    """
    if is_original(config):
        size = widths(config, "sam_vit_b", SAM)
        found = {native: size[name] for name, native in SAM_NAMES.items()}
    else:
        stated = config["vision_config"]["sam_config"]
        usual = {native: SAM[name] for name, native in SAM_NAMES.items()}
        found = known_fields(stated, usual)
    first, last = found["downsample_channels"]
    return {
        **found,
        "global_attn_indexes": list(found["global_attn_indexes"]),
        "downsample_channels": [first, last_channels or last],
        "mlp_dim": 4 * found["hidden_size"],
        "image_size": 1024,
        "patch_size": 16,
    }


def original_config(
    native: Config,
    dtype: str,
    *,
    architecture: str,
    tower: str,
    width: Mapping[str, Config],
    features: int,
) -> dict[str, Any]:
    """config.json of the authors' layout for keyword arguments of the class's config.

    Args:
        native: those arguments.
        dtype: of the weights.
        architecture: the authors' class.
        tower: their model_name of the towers.
        width: sizes of the tower after SAM, under its name.
        features: width of the projector's input.
    """
    text, sam = native["text_config"], native["vision_config"]["sam_config"]
    language = {key: value for key, value in text.items() if key in TEXT}
    language["first_k_dense_replace"] = text["mlp_layer_types"].count("dense")
    language |= {**LEFTOVERS, "torch_dtype": dtype}
    sizes = {"sam_vit_b": {name: sam[native] for name, native in SAM_NAMES.items()}, **width}
    return {
        "architectures": [architecture],
        "model_type": "deepseek_vl_v2",
        "candidate_resolutions": [[1024, 1024]],
        "global_view_pos": "head",
        "tile_tag": "2D",
        "projector_config": {
            **{"input_dim": features, "n_embed": text["hidden_size"]},
            **{"model_type": "mlp_projector", "projector_type": "linear"},
        },
        "vision_config": {
            "image_size": 1024,
            "mlp_ratio": 3.7362,
            "model_name": tower,
            "model_type": "vision",
            "width": sizes,
        },
        "language_config": language,
        # The authors' class reads the top level, vLLM the nested copy.
        **language,
    }
