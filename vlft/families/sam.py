"""The SAM tower of DeepSeek-VL 7b: sizes by name, settings, tensor names of both layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft.errors import CheckpointError
from vlft.families.keymap import KeyRule

if TYPE_CHECKING:
    from collections.abc import Mapping

FIELDS = (
    "hidden_size", "output_channels", "num_hidden_layers", "num_attention_heads", "num_channels",
    "image_size", "patch_size", "hidden_act", "layer_norm_eps", "qkv_bias", "mlp_ratio",
    "use_abs_pos", "use_rel_pos", "window_size", "global_attn_indexes", "mlp_dim",
)  # fmt: skip

# What the authors' code looks up by model_name; a field of the config overrides it.
SIZES: Mapping[str, Mapping[str, Any]] = {
    "sam_b_downsample": {
        "width": 768, "layers": 12, "heads": 12, "patch_size": 16, "prompt_embed_dim": 256,
        "global_attn_indexes": [2, 5, 8, 11], "window_size": 14, "mlp_ratio": 4.0,
        "downsample_channels": [512, 1024],
    },
}  # fmt: skip

DEFAULT_NAME = "sam_b_downsample"

# Defaults of SamVisionConfig, which a config.json may leave out.
CLASS_DEFAULTS: Mapping[str, Any] = {
    "model_type": "sam_vision_model", "hidden_size": 768, "output_channels": 256,
    "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 1024, "patch_size": 16,
    "global_attn_indexes": [2, 5, 8, 11], "window_size": 14, "mlp_ratio": 4.0,
}  # fmt: skip


def vision_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of SamVisionConfig for the high_res_cfg of the authors."""
    name = params.get("model_name", DEFAULT_NAME)
    if name not in SIZES:
        raise CheckpointError(
            f"unknown vision model_name {name!r}", hint=f"allowed: {', '.join(SIZES)}"
        )
    size = {key: params.get(key, value) for key, value in SIZES[name].items()}
    neck = size["prompt_embed_dim"]
    if list(size["downsample_channels"]) != [2 * neck, 4 * neck]:
        raise CheckpointError(
            f"downsample_channels {size['downsample_channels']} after a neck of {neck} channels; "
            f"transformers' class supports {[2 * neck, 4 * neck]} only",
            hint="this checkpoint cannot be loaded",
        )
    return {
        "model_type": "sam_vision_model",
        "hidden_size": size["width"],
        "output_channels": neck,
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "image_size": params.get("image_size", 1024),
        "patch_size": size["patch_size"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "mlp_ratio": size["mlp_ratio"],
        "window_size": size["window_size"],
        "global_attn_indexes": list(size["global_attn_indexes"]),
    }


def clean_vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The known fields of a SamVisionConfig."""
    known = {key: config[key] for key in FIELDS if config.get(key) is not None}
    return {**CLASS_DEFAULTS, **known}


def tower_params(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' high_res_cfg, less mean and std, for keyword arguments of SamVisionConfig."""
    usual = SIZES[DEFAULT_NAME]
    neck = vision["output_channels"]
    found = {
        "width": vision["hidden_size"],
        "layers": vision["num_hidden_layers"],
        "heads": vision["num_attention_heads"],
        "patch_size": vision["patch_size"],
        "prompt_embed_dim": neck,
        "global_attn_indexes": list(vision["global_attn_indexes"]),
        "window_size": vision.get("window_size", usual["window_size"]),
        "mlp_ratio": vision.get("mlp_ratio", usual["mlp_ratio"]),
        "downsample_channels": [2 * neck, 4 * neck],
    }
    return {
        "image_size": vision["image_size"],
        "model_name": DEFAULT_NAME,
        "output_dim": 4 * neck,
        "select_feature": "same",
        "select_layer": -1,
        "ckpt_path": "",
        **{key: value for key, value in found.items() if value != usual[key]},
    }


def key_rules(original: str, native: str) -> list[KeyRule]:
    """The rules of a tower at ``original``; ``native`` is the model that holds its parts."""
    tower = f"{native}.high_res_vision_model"
    block, layer = f"{original}.blocks.{{i}}", f"{tower}.vision_encoder.layers.{{i}}"
    encoder = f"{tower}.vision_encoder"
    necks = (("neck", f"{encoder}.neck"), ("neck_hd", f"{native}.high_res_vision_neck"))
    return [
        KeyRule(f"{original}.pos_embed", (f"{encoder}.pos_embed",)),
        KeyRule(f"{original}.patch_embed.proj.{{p}}", (f"{encoder}.patch_embed.projection.{{p}}",)),
        KeyRule(f"{block}.norm1.{{p}}", (f"{layer}.layer_norm1.{{p}}",)),
        KeyRule(f"{block}.norm2.{{p}}", (f"{layer}.layer_norm2.{{p}}",)),
        KeyRule(f"{block}.{{rest}}", (f"{layer}.{{rest}}",)),
        *(
            KeyRule(f"{original}.{ours}.{number}.{{p}}", (f"{theirs}.{name}.{{p}}",))
            for ours, theirs in necks
            for number, name in enumerate(("conv1", "layer_norm1", "conv2", "layer_norm2"))
        ),
        KeyRule(f"{original}.downsamples.0.{{p}}", (f"{native}.high_res_vision_proj.conv1.{{p}}",)),
        KeyRule(f"{original}.downsamples.1.{{p}}", (f"{native}.high_res_vision_proj.conv2.{{p}}",)),
        KeyRule(f"{original}.hd_alpha_downsamples", (f"{native}.high_res_vision_alpha",)),
    ]
