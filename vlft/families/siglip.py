"""The SigLIP tower: sizes by name, settings, tensor names of both layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft.errors import CheckpointError
from vlft.families.keymap import KeyRule

if TYPE_CHECKING:
    from collections.abc import Mapping

FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps", "vision_use_head",
)  # fmt: skip

# What the authors' code looks up by model_name; a field of the config overrides it.
SIZES: Mapping[str, Mapping[str, float]] = {
    "siglip_large_patch16_384": {
        "width": 1024, "layers": 24, "heads": 16, "patch_size": 16, "mlp_ratio": 4.0,
    },
    "siglip_so400m_patch14_384": {
        "width": 1152, "layers": 27, "heads": 16, "patch_size": 14, "mlp_ratio": 3.7362,
    },
}  # fmt: skip

DEFAULT_NAME = "siglip_large_patch16_384"

# Defaults of SiglipVisionConfig, which a config.json may leave out.
CLASS_DEFAULTS: Mapping[str, Any] = {
    "model_type": "siglip_vision_model", "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": False,
}  # fmt: skip


def vision_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of SiglipVisionConfig for the params of an authors' tower."""
    name = params.get("model_name", DEFAULT_NAME)
    if name not in SIZES:
        raise CheckpointError(
            f"unknown vision model_name {name!r}", hint=f"allowed: {', '.join(SIZES)}"
        )
    size = {key: params.get(key, value) for key, value in SIZES[name].items()}
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": size["width"],
        # A ratio that is a rounded quotient must give its dividend back, not one less.
        "intermediate_size": int(size["width"] * size["mlp_ratio"] + 1e-6),
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "image_size": params.get("image_size", 384),
        "patch_size": size["patch_size"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "vision_use_head": False,
    }


def clean_vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The known fields of a SiglipVisionConfig; no head unless the file states one."""
    known = {key: config[key] for key in FIELDS if config.get(key) is not None}
    return {**CLASS_DEFAULTS, **known}


def tower_params(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' tower params for keyword arguments of SiglipVisionConfig."""
    found = {
        "width": vision["hidden_size"],
        "layers": vision["num_hidden_layers"],
        "heads": vision["num_attention_heads"],
        "patch_size": vision["patch_size"],
        "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
    }
    usual = SIZES[DEFAULT_NAME]
    return {
        "image_size": vision["image_size"],
        "model_name": DEFAULT_NAME,
        "select_feature": "same",
        "select_layer": -1,
        **{key: value for key, value in found.items() if value != usual[key]},
    }


def key_rules(original: str, native: str, *, attention_output: str = "out_proj") -> list[KeyRule]:
    """The rules of a tower at these prefixes; the name of attention's output differs by class."""
    block, layer = f"{original}.blocks.{{i}}", f"{native}.encoder.layers.{{i}}"
    embeddings = f"{native}.embeddings"
    return [
        KeyRule(f"{original}.pos_embed", (f"{embeddings}.position_embedding.weight",), "squeeze"),
        KeyRule(f"{original}.patch_embed.proj.{{p}}", (f"{embeddings}.patch_embedding.{{p}}",)),
        KeyRule(f"{block}.norm1.{{p}}", (f"{layer}.layer_norm1.{{p}}",)),
        KeyRule(f"{block}.norm2.{{p}}", (f"{layer}.layer_norm2.{{p}}",)),
        KeyRule(
            f"{block}.attn.qkv.{{p}}",
            tuple(f"{layer}.self_attn.{name}_proj.{{p}}" for name in "qkv"),
            "split",
        ),
        KeyRule(f"{block}.attn.proj.{{p}}", (f"{layer}.self_attn.{attention_output}.{{p}}",)),
        KeyRule(f"{block}.mlp.{{leaf}}.{{p}}", (f"{layer}.mlp.{{leaf}}.{{p}}",)),
        KeyRule(f"{original}.norm.{{p}}", (f"{native}.post_layernorm.{{p}}",)),
    ]
