"""DeepSeek-VL with two towers: deepseek-vl-7b-base and -chat.

image, 1024 px -> SAM tower, neck, downsampling -> linear to half the width -+
       384 px  -> SigLIP tower                  -> linear to half the width -+-> GELU, linear -> LLM
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from vlft.families import llama, sam, siglip
from vlft.families.base import Config, Family, Parts, Pixels, TransformersLayout, from_transformers
from vlft.families.deepseek_vl import (
    IMAGE_TAG,
    SYSTEM_PROMPT,
    aligner_config,
    check_aligner,
    image_tokens,
)
from vlft.families.keymap import KeyMap, KeyRule
from vlft.families.pixels import (
    HALF,
    PREPROCESSOR_FILE,
    SquareSettings,
    downscaled,
    normalised,
    read_settings,
    square_files,
    square_pixels,
)
from vlft.files import read_object_if_there

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from vlft.families.base import Tiles

PROJECTOR = "low_high_hybrid_split_mlp_gelu"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

KEYS = KeyMap(
    [
        *siglip.key_rules("vision_model.vision_tower_low.vision_tower", "model.vision_model"),
        *sam.key_rules("vision_model.vision_tower_high.vision_tower", "model"),
        KeyRule("aligner.high_up_proj.{p}", ("model.aligner.high_res_vision_proj.{p}",)),
        KeyRule("aligner.low_up_proj.{p}", ("model.aligner.vision_proj.{p}",)),
        KeyRule("aligner.layers.1.{p}", ("model.aligner.proj.{p}",)),
        KeyRule("language_model.model.{rest}", ("model.language_model.{rest}",)),
        KeyRule("language_model.lm_head.{p}", ("lm_head.{p}",)),
    ],
    unused=[
        "vision_model.vision_tower_low.vision_tower.attn_pool.{rest}",
        "vision_model.high_layer_norm.{p}",
        "vision_model.low_layer_norm.{p}",
    ],
)


def _matches(config: Config) -> bool:
    """Whether the model has the hybrid tower."""
    if config.get("model_type") == "deepseek_vl_hybrid":
        return True
    return (config.get("vision_config") or {}).get("cls") == "HybridVisionTower"


def _native_config(config: Config, image_token_id: int) -> dict[str, Any]:
    """Keyword arguments of DeepseekVLHybridConfig for a config.json of the authors."""
    check_aligner(config, PROJECTOR)
    language = llama.text_config(config["language_config"])
    params = config["vision_config"]["params"]
    return {
        "text_config": language,
        "vision_config": siglip.vision_config(params["low_res_cfg"]),
        "high_res_vision_config": sam.vision_config(params["high_res_cfg"]),
        "image_token_id": image_token_id,
        "tie_word_embeddings": language["tie_word_embeddings"],
    }


def _native_config_of_transformers(config: Config, image_token_id: int) -> dict[str, Any]:
    """Keyword arguments of DeepseekVLHybridConfig for a config.json of transformers' layout."""
    return {
        **llama.clean_text_config(config),
        "vision_config": siglip.clean_vision_config(config["vision_config"]),
        "high_res_vision_config": sam.clean_vision_config(config["high_res_vision_config"]),
        "image_token_id": image_token_id,
    }


def _original_config(native: Config, dtype: str) -> dict[str, Any]:
    """config.json of the authors' layout for keyword arguments of DeepseekVLHybridConfig.

    Mean and standard deviation of both towers are those of the published checkpoints.
    """
    text, vision = native["text_config"], native["vision_config"]
    high = {"pixel_mean": list(CLIP_MEAN), "pixel_std": list(CLIP_STD)}
    low = {"pixel_mean": list(HALF), "pixel_std": list(HALF), "ckpt_path": ""}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": dtype,
        "vision_config": {
            "cls": "HybridVisionTower",
            "model_type": "vision",
            "params": {
                "concat_type": "tuple",
                "high_res_cfg": {**sam.tower_params(native["high_res_vision_config"]), **high},
                "low_res_cfg": {
                    **siglip.tower_params(vision),
                    **low,
                    "output_dim": vision["hidden_size"],
                },
            },
        },
        "aligner_config": aligner_config(
            vision["hidden_size"], text["hidden_size"], kind=PROJECTOR
        ),
        "language_config": llama.language_config(text, dtype),
    }


def _pixels(folder: Path, raw: Config, native: Config) -> Pixels:
    """Both towers get one padded square; SigLIP's is downscaled in floats before normalisation."""
    low_size = native["vision_config"]["image_size"]
    settings = _square_settings(folder, raw, native)
    (high_mean, high_std), (low_mean, low_std) = _towers_mean_std(folder, raw)

    def inputs(views: Tensor, tiles: Sequence[Tiles]) -> dict[str, Tensor]:  # noqa: ARG001
        return {
            "pixel_values": normalised(downscaled(views, low_size), low_mean, low_std),
            "high_res_pixel_values": normalised(views, high_mean, high_std),
        }

    fingerprint = repr((asdict(settings), low_size, high_mean, high_std, low_mean, low_std))
    square = square_pixels(settings, image_tokens(native))
    return replace(square, inputs=inputs, fingerprint=fingerprint)


def _square_settings(folder: Path, raw: Config, native: Config) -> SquareSettings:
    """The padded square, its border in the SAM tower's mean colour, not normalised yet."""
    size = native["high_res_vision_config"]["image_size"]
    settings = read_settings(folder, size, mean=CLIP_MEAN, normalise=False)
    if raw.get("model_type") != "deepseek_vl_hybrid":
        return settings
    (mean, std), _ = _towers_mean_std(folder, raw)
    return replace(settings, mean=tuple(mean), std=tuple(std), normalise=False)


def _towers_mean_std(
    folder: Path, raw: Config
) -> tuple[tuple[list[float], list[float]], tuple[list[float], list[float]]]:
    """(mean, std) of the SAM tower and of the SigLIP tower, from where the layout has them."""
    if raw.get("model_type") == "deepseek_vl_hybrid":
        stated = read_object_if_there(folder / PREPROCESSOR_FILE)
        return (
            (
                stated.get("high_res_image_mean", list(CLIP_MEAN)),
                stated.get("high_res_image_std", list(CLIP_STD)),
            ),
            (stated.get("image_mean", list(HALF)), stated.get("image_std", list(HALF))),
        )
    params = raw["vision_config"]["params"]
    high, low = params["high_res_cfg"], params["low_res_cfg"]
    return (
        (high.get("pixel_mean", list(CLIP_MEAN)), high.get("pixel_std", list(CLIP_STD))),
        (low.get("pixel_mean", list(HALF)), low.get("pixel_std", list(HALF))),
    )


def _processor_files(
    folder: Path, raw: Config, native: Config, layout: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """preprocessor_config.json and processor_config.json of a layout."""
    settings = _square_settings(folder, raw, native)
    tokens = image_tokens(native)
    files = square_files(settings, tokens, layout, image_tag=IMAGE_TAG, native="DeepseekVLHybrid")
    if layout == "original":
        return files
    (high_mean, high_std), (low_mean, low_std) = _towers_mean_std(folder, raw)
    low_size = native["vision_config"]["image_size"]
    return {
        **files[0],
        "do_normalize": True,
        "image_mean": list(low_mean),
        "image_std": list(low_std),
        "high_res_image_mean": list(high_mean),
        "high_res_image_std": list(high_std),
        "size": {"height": low_size, "width": low_size},
        "high_res_size": files[0]["size"],
    }, files[1]


def _vision_features(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(I, T, W) features of both towers side by side, SigLIP's first; they have the same grid."""
    parts: Any = model.model
    low = parts.get_low_res_image_features(inputs["pixel_values"])
    high = parts.get_high_res_image_features(inputs["high_res_pixel_values"])
    return torch.cat([low.last_hidden_state, high.last_hidden_state], dim=-1)


def _align(model: nn.Module, features: Tensor, tiles: Sequence[Tiles]) -> Tensor:  # noqa: ARG001
    """(I * T, D) features that replace the image tokens, for (I, T, W) features of the towers."""
    aligner: Any = model.model.aligner  # type: ignore[union-attr]
    low = features.shape[-1] - aligner.high_res_vision_proj.in_features
    aligned: Tensor = aligner(features[..., :low], features[..., low:])
    return aligned.flatten(0, 1)


FAMILY = Family(
    name="deepseek_vl_hybrid",
    title="DeepSeek-VL (SAM and SigLIP towers)",
    model_types={"multi_modality": "original", "deepseek_vl_hybrid": "transformers"},
    matches=_matches,
    template="deepseek_vl.jinja",
    image_tag=IMAGE_TAG,
    system_prompt=SYSTEM_PROMPT,
    parts=Parts(
        vision=(
            "model.vision_model",
            "model.high_res_vision_model",
            "model.high_res_vision_neck",
            "model.high_res_vision_proj",
            "model.high_res_vision_alpha",
        ),
        aligner=("model.aligner",),
        language="model.language_model",
        head="lm_head",
    ),
    attention_inputs=("q_proj", "k_proj", "v_proj"),
    keys=KEYS,
    model_class=from_transformers("DeepseekVLHybridForConditionalGeneration"),
    native_config=_native_config,
    pixels=_pixels,
    vision_features=_vision_features,
    align=_align,
    transformers_layout=TransformersLayout(
        native_config=_native_config_of_transformers,
        original_config=_original_config,
        processor_files=_processor_files,
    ),
)
