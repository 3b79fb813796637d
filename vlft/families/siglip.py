"""The SigLIP tower: sizes by name, settings, tensor names of both layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft.families.base import known_fields, sizes_by_name
from vlft.families.keymap import KeyRule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from vlft.families.base import Config

# What the authors' code looks up by model_name; a field of the config overrides it.
SIZES: Mapping[str, Config] = {
    "siglip_large_patch16_384": {
        "width": 1024, "layers": 24, "heads": 16, "patch_size": 16, "mlp_ratio": 4.0,
    },
    "siglip_so400m_patch14_384": {
        "width": 1152, "layers": 27, "heads": 16, "patch_size": 14, "mlp_ratio": 3.7362,
    },
}  # fmt: skip
DEFAULT_NAME = "siglip_large_patch16_384"

# Sizes in the authors' params -> in SiglipVisionConfig.
NAMES: Mapping[str, str] = {
    "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "patch_size": "patch_size",
}  # fmt: skip

# Defaults of SiglipVisionConfig, which a config.json may leave out; no head unless it states one.
FIELDS: Mapping[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_channels": None, "image_size": 224, "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": False,
}  # fmt: skip


def vision_config(params: Config) -> dict[str, Any]:
    """Keyword arguments of SiglipVisionConfig for the params of an authors' tower."""
    size = sizes_by_name(params, SIZES, DEFAULT_NAME)
    return {
        "model_type": "siglip_vision_model",
        **{native: size[key] for key, native in NAMES.items()},
        # A ratio that is a rounded quotient must give its dividend back, not one less.
        "intermediate_size": int(size["width"] * size["mlp_ratio"] + 1e-6),
        "image_size": params.get("image_size") or 384,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "vision_use_head": False,
    }


def clean_vision_config(config: Config) -> dict[str, Any]:
    """Keyword arguments of SiglipVisionConfig for the vision_config of transformers' layout."""
    return {"model_type": "siglip_vision_model", **known_fields(config, FIELDS)}


def tower_params(vision: Config) -> dict[str, Any]:
    """The authors' tower params for keyword arguments of SiglipVisionConfig."""
    found = {key: vision[native] for key, native in NAMES.items()}
    usual = SIZES[DEFAULT_NAME]
    found["mlp_ratio"] = vision["intermediate_size"] / vision["hidden_size"]
    return {
        "image_size": vision["image_size"],
        "model_name": DEFAULT_NAME,
        "select_feature": "same",
        "select_layer": -1,
        **{key: value for key, value in found.items() if value != usual[key]},
    }


def vision_features(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(V, T, W) features of the tower for (V, 3, H, W) views."""
    tower: Any = model.model.vision_model  # type: ignore[union-attr]
    features: Tensor = tower(inputs["pixel_values"]).last_hidden_state
    return features


def key_rules(original: str, native: str, *, attention_output: str = "out_proj") -> list[KeyRule]:
    """The rules of a tower at these prefixes; the name of attention's output differs by class."""
    block, layer = f"{original}.blocks.{{i}}", f"{native}.encoder.layers.{{i}}"
    embeddings, attention = f"{native}.embeddings", f"{layer}.self_attn"
    qkv = tuple(f"{attention}.{name}_proj.{{p}}" for name in "qkv")
    return [
        KeyRule(f"{original}.pos_embed", (f"{embeddings}.position_embedding.weight",), "squeeze"),
        KeyRule(f"{original}.patch_embed.proj.{{p}}", (f"{embeddings}.patch_embedding.{{p}}",)),
        KeyRule(f"{block}.norm1.{{p}}", (f"{layer}.layer_norm1.{{p}}",)),
        KeyRule(f"{block}.norm2.{{p}}", (f"{layer}.layer_norm2.{{p}}",)),
        KeyRule(f"{block}.attn.qkv.{{p}}", qkv, "split"),
        KeyRule(f"{block}.attn.proj.{{p}}", (f"{attention}.{attention_output}.{{p}}",)),
        KeyRule(f"{block}.mlp.{{leaf}}.{{p}}", (f"{layer}.mlp.{{leaf}}.{{p}}",)),
        KeyRule(f"{original}.norm.{{p}}", (f"{native}.post_layernorm.{{p}}",)),
    ]
