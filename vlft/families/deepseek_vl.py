"""DeepSeek-VL with one SigLIP tower: deepseek-vl-1.3b-base and -chat, and the tiny model.

    picture -> SigLIP tower -> aligner (linear, GELU, linear) -> Llama LLM
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.errors import CheckpointError
from vlft.families.base import Config, Family, Parts, Pixels
from vlft.families.keymap import KeyMap, KeyRule

if TYPE_CHECKING:
    from torch import Tensor, nn

SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)

# What the authors' code looks up by model_name; configs may override each beside the name.
SIGLIP_SIZES: Mapping[str, Mapping[str, float]] = {
    "siglip_large_patch16_384": {
        "width": 1024, "layers": 24, "heads": 16, "patch_size": 16, "mlp_ratio": 4.0,
    },
    "siglip_so400m_patch14_384": {
        "width": 1152, "layers": 27, "heads": 16, "patch_size": 14, "mlp_ratio": 3.7362,
    },
}  # fmt: skip

LLAMA_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings",
    "initializer_range", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "attention_bias", "mlp_bias",
)  # fmt: skip

# LlamaConfig's own defaults, which the 7b language config relies on.
LLAMA_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}

SIGLIP_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps", "vision_use_head",
)  # fmt: skip

_TOWER = "vision_model.vision_tower"
_BLOCK = _TOWER + ".blocks.{i}"
_LAYER = "model.vision_model.encoder.layers.{i}"

KEYS = KeyMap(
    [
        KeyRule(
            f"{_TOWER}.pos_embed",
            ("model.vision_model.embeddings.position_embedding.weight",),
            "squeeze",
        ),
        KeyRule(
            f"{_TOWER}.patch_embed.proj.{{p}}",
            ("model.vision_model.embeddings.patch_embedding.{p}",),
        ),
        KeyRule(f"{_BLOCK}.norm1.{{p}}", (f"{_LAYER}.layer_norm1.{{p}}",)),
        KeyRule(f"{_BLOCK}.norm2.{{p}}", (f"{_LAYER}.layer_norm2.{{p}}",)),
        KeyRule(
            f"{_BLOCK}.attn.qkv.{{p}}",
            tuple(f"{_LAYER}.self_attn.{name}_proj.{{p}}" for name in "qkv"),
            "split",
        ),
        KeyRule(f"{_BLOCK}.attn.proj.{{p}}", (f"{_LAYER}.self_attn.out_proj.{{p}}",)),
        KeyRule(f"{_BLOCK}.mlp.fc1.{{p}}", (f"{_LAYER}.mlp.fc1.{{p}}",)),
        KeyRule(f"{_BLOCK}.mlp.fc2.{{p}}", (f"{_LAYER}.mlp.fc2.{{p}}",)),
        KeyRule(f"{_TOWER}.norm.{{p}}", ("model.vision_model.post_layernorm.{p}",)),
        KeyRule("aligner.layers.0.{p}", ("model.aligner.linear1.{p}",)),
        KeyRule("aligner.layers.2.{p}", ("model.aligner.linear2.{p}",)),
        KeyRule("language_model.model.{rest}", ("model.language_model.{rest}",)),
        KeyRule("language_model.lm_head.{p}", ("lm_head.{p}",)),
    ],
    unused=[f"{_TOWER}.attn_pool.{{rest}}"],
)


def recognises(config: Config) -> bool:
    """DeepSeek-VL with the SigLIP tower, and neither the hybrid tower nor Janus."""
    if config.get("model_type") == "deepseek_vl":
        return True
    vision = config.get("vision_config") or {}
    return vision.get("cls", "CLIPVisionTower") == "CLIPVisionTower" and not any(
        key.startswith("gen_") for key in config
    )


def native_config(config: Config, image_token_id: int) -> dict[str, Any]:
    """Keyword arguments of DeepseekVLConfig for a config.json of the authors."""
    vision = config["vision_config"].get("params") or {}
    aligner = config.get("aligner_config", {}).get("params") or {}
    _check_aligner(aligner)
    sizes = SIGLIP_SIZES.get(vision.get("model_name", "siglip_large_patch16_384"))
    if sizes is None:
        raise CheckpointError(
            f"unknown vision model_name {vision['model_name']!r}",
            hint=f"allowed: {', '.join(SIGLIP_SIZES)}",
        )
    size = {**sizes, **{key: vision[key] for key in sizes if key in vision}}
    language = _llama(config["language_config"])
    return {
        "text_config": language,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": size["width"],
            "intermediate_size": int(size["width"] * size["mlp_ratio"]),
            "num_hidden_layers": size["layers"],
            "num_attention_heads": size["heads"],
            "image_size": vision.get("image_size", 384),
            "patch_size": size["patch_size"],
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "vision_use_head": False,
        },
        "image_token_id": image_token_id,
        "tie_word_embeddings": language["tie_word_embeddings"],
    }


def clean_config(config: Config, image_token_id: int) -> dict[str, Any]:
    """Keyword arguments of DeepseekVLConfig for a config.json of transformers' layout."""
    vision = {key: config["vision_config"][key] for key in SIGLIP_FIELDS if key in config["vision_config"]}
    # Files without the field were written by releases that had no head here.
    vision.setdefault("vision_use_head", False)
    language = _llama(config["text_config"])
    # The class's own default ties; the text config states what the weights are.
    tied = config.get("tie_word_embeddings", language["tie_word_embeddings"])
    return {
        "text_config": {**language, "tie_word_embeddings": tied},
        "vision_config": {"model_type": "siglip_vision_model", **vision},
        "image_token_id": image_token_id,
        "tie_word_embeddings": tied,
    }


def image_tokens(config: Config) -> int:
    """Tokens per picture: one per patch."""
    vision = config["vision_config"]
    return int(vision["image_size"] // vision["patch_size"]) ** 2


def pixels(folder: Path, config: Config) -> Pixels:
    """The authors' VLMImageProcessor with the numbers of preprocessor_config.json.

    The background colour is computed from the mean; the file's is ignored, as the authors do.
    """
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.exists() else {}
    size = config["vision_config"]["image_size"]
    mean = tuple(settings.get("image_mean", (0.5, 0.5, 0.5)))
    std = tuple(settings.get("image_std", (0.5, 0.5, 0.5)))
    min_size = settings.get("min_size", 14)
    rescale = settings.get("rescale_factor", 0.00392156862745098)
    normalise = settings.get("do_normalize", True)
    background = tuple(int(value * 255) for value in mean)

    def transform(picture: Any) -> Tensor:
        from vlft.families.pixels import resize_and_pad, to_pixel_values

        square = resize_and_pad(picture, size, min_size, background)  # type: ignore[arg-type]
        return to_pixel_values(
            square, rescale, mean if normalise else None, std if normalise else None
        )

    return Pixels(transform, repr((size, min_size, background, rescale, normalise, mean, std)))


def encode_images(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """(I, 3, H, W) pixels -> (I, T, D) features that replace the image tokens."""
    features: Tensor = model.model.get_image_features(  # type: ignore[union-attr, operator]
        pixel_values, return_dict=True
    ).pooler_output
    return features


def _llama(config: Config) -> dict[str, Any]:
    known = {key: config[key] for key in LLAMA_FIELDS if config.get(key) is not None}
    return {"model_type": "llama", **LLAMA_DEFAULTS, **known}


def _check_aligner(params: Config) -> None:
    found = (params.get("projector_type", "mlp_gelu"), params.get("depth", 2))
    if found != ("mlp_gelu", 2):
        raise CheckpointError(
            f"aligner {found[0]!r} of depth {found[1]}; transformers' DeepSeek-VL class holds "
            "mlp_gelu of depth 2 only",
            hint="this checkpoint cannot be loaded",
        )


FAMILY = Family(
    name="deepseek_vl",
    title="DeepSeek-VL (SigLIP tower)",
    model_types={"multi_modality": "original", "deepseek_vl": "transformers"},
    recognises=recognises,
    template="deepseek_vl.jinja",
    image_tag="<image_placeholder>",
    roles=("User", "Assistant"),
    system_prompt=SYSTEM_PROMPT,
    parts=Parts(
        vision="model.vision_model",
        aligner="model.aligner",
        language="model.language_model",
        head="lm_head",
    ),
    attention_inputs=("q_proj", "k_proj", "v_proj"),
    keys=KEYS,
    model_class="DeepseekVLForConditionalGeneration",
    native_config=native_config,
    clean_config=clean_config,
    pixels=pixels,
    image_tokens=image_tokens,
    encode_images=encode_images,
)
