"""The SAM tower of DeepSeek-VL 7b: sizes by name, settings, tensor names of both layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft.errors import CheckpointError
from vlft.families.base import known_fields, sizes_by_name
from vlft.families.keymap import KeyRule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlft.families.base import Config

# What the authors' code looks up by model_name; a field of the config overrides it.
SIZES: Mapping[str, Config] = {
    "sam_b_downsample": {
        "width": 768, "layers": 12, "heads": 12, "patch_size": 16, "prompt_embed_dim": 256,
        "global_attn_indexes": [2, 5, 8, 11], "window_size": 14, "mlp_ratio": 4.0,
        "downsample_channels": [512, 1024],
    },
}  # fmt: skip
DEFAULT_NAME = "sam_b_downsample"

# Sizes in the authors' high_res_cfg -> in SamVisionConfig.
NAMES: Mapping[str, str] = {
    "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "patch_size": "patch_size", "prompt_embed_dim": "output_channels",
    "global_attn_indexes": "global_attn_indexes", "window_size": "window_size",
    "mlp_ratio": "mlp_ratio",
}  # fmt: skip

# Defaults of SamVisionConfig, which a config.json may leave out.
FIELDS: Mapping[str, Any] = {
    "hidden_size": 768, "output_channels": 256, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_channels": None, "image_size": 1024, "patch_size": 16,
    "hidden_act": None, "layer_norm_eps": None, "qkv_bias": None, "mlp_ratio": 4.0,
    "use_abs_pos": None, "use_rel_pos": None, "window_size": 14,
    "global_attn_indexes": [2, 5, 8, 11], "mlp_dim": None,
}  # fmt: skip


def vision_config(params: Config) -> dict[str, Any]:
    """Keyword arguments of SamVisionConfig for the high_res_cfg of the authors."""
    size = sizes_by_name(params, SIZES, DEFAULT_NAME)
    neck = size["prompt_embed_dim"]
    if list(size["downsample_channels"]) != [2 * neck, 4 * neck]:
        raise CheckpointError(
            f"downsample_channels {size['downsample_channels']} after a neck of {neck} channels; "
            f"transformers' class supports {[2 * neck, 4 * neck]} only",
            hint="this checkpoint cannot be loaded",
        )
    return {
        "model_type": "sam_vision_model",
        **{native: size[key] for key, native in NAMES.items()},
        "image_size": params.get("image_size") or 1024,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }


def clean_vision_config(config: Config) -> dict[str, Any]:
    """Keyword arguments of SamVisionConfig for the vision config of transformers' layout."""
    return {"model_type": "sam_vision_model", **known_fields(config, FIELDS)}


def check_global_layers(vision: Config) -> None:
    """Raises CheckpointError for a tower without global attention.

    The class of DeepSeek-VL 7b takes the features of the first such layer besides the last ones.
    """
    if not vision["global_attn_indexes"]:
        found = "global_attn_indexes: found [], at least one layer is needed"
        raise CheckpointError(found, hint="write or download it again")


def tower_params(vision: Config) -> dict[str, Any]:
    """The authors' high_res_cfg, less mean and std, for keyword arguments of SamVisionConfig."""
    usual, neck = SIZES[DEFAULT_NAME], vision["output_channels"]
    found = {key: vision[native] for key, native in NAMES.items()}
    found["downsample_channels"] = [2 * neck, 4 * neck]
    return {
        "image_size": vision["image_size"],
        "model_name": DEFAULT_NAME,
        "output_dim": 4 * neck,
        "select_feature": "same",
        "select_layer": -1,
        "ckpt_path": "",
        **{key: value for key, value in found.items() if value != usual[key]},
    }


def encoder_rules(original: str, native: str) -> list[KeyRule]:
    """The rules of patches, positions and layers, of a tower at ``original``."""
    block, layer = f"{original}.blocks.{{i}}", f"{native}.layers.{{i}}"
    return [
        KeyRule(f"{original}.pos_embed", (f"{native}.pos_embed",)),
        KeyRule(f"{original}.patch_embed.proj.{{p}}", (f"{native}.patch_embed.projection.{{p}}",)),
        KeyRule(f"{block}.norm1.{{p}}", (f"{layer}.layer_norm1.{{p}}",)),
        KeyRule(f"{block}.norm2.{{p}}", (f"{layer}.layer_norm2.{{p}}",)),
        KeyRule(f"{block}.{{rest}}", (f"{layer}.{{rest}}",)),
    ]


def neck_rules(original: str, native: str) -> list[KeyRule]:
    """The rules of a neck, whose parts the authors number."""
    names = enumerate(("conv1", "layer_norm1", "conv2", "layer_norm2"))
    return [KeyRule(f"{original}.{n}.{{p}}", (f"{native}.{name}.{{p}}",)) for n, name in names]


def key_rules(original: str, native: str) -> list[KeyRule]:
    """The rules of a tower at ``original``; ``native`` is the model that holds its parts."""
    encoder = f"{native}.high_res_vision_model.vision_encoder"
    return [
        *encoder_rules(original, encoder),
        *neck_rules(f"{original}.neck", f"{encoder}.neck"),
        *neck_rules(f"{original}.neck_hd", f"{native}.high_res_vision_neck"),
        KeyRule(f"{original}.downsamples.0.{{p}}", (f"{native}.high_res_vision_proj.conv1.{{p}}",)),
        KeyRule(f"{original}.downsamples.1.{{p}}", (f"{native}.high_res_vision_proj.conv2.{{p}}",)),
        KeyRule(f"{original}.hd_alpha_downsamples", (f"{native}.high_res_vision_alpha",)),
    ]
