"""DeepSeek-VL with two towers: deepseek-vl-7b-base and -chat.

image, 1024 px -> SAM tower, neck, downsampling -> linear to half the width -+
       384 px  -> SigLIP tower                  -> linear to half the width -+-> GELU, linear -> LLM
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from vlft.families import deepseek_vl, multi_modality, sam, siglip
from vlft.families.base import PREPROCESSOR_FILE, Config, Parts, Pixels, Views
from vlft.families.keymap import KeyMap, KeyRule
from vlft.families.pixels import HALF, normalised, read_settings, square_pixels
from vlft.families.schemas import PROCESSOR
from vlft.files import read_object_if_there

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from vlft.data.encode import Tiles

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
        *multi_modality.LLAMA_KEYS,
    ],
    unused=[
        "vision_model.vision_tower_low.vision_tower.attn_pool.{rest}",
        "vision_model.high_layer_norm.{p}",
        "vision_model.low_layer_norm.{p}",
    ],
)


def _matches(config: Config) -> bool:
    """Whether the model has the hybrid tower."""
    return (config.get("vision_config") or {}).get("cls") == "HybridVisionTower"


def _native_config(config: Config, image_token_id: int) -> dict[str, Any]:
    """Keyword arguments of DeepseekVLHybridConfig."""
    if multi_modality.is_original(config):
        deepseek_vl.check_aligner(config, PROJECTOR)
        params = config["vision_config"]["params"]
        low = siglip.vision_config(params["low_res_cfg"])
        high = sam.vision_config(params["high_res_cfg"])
    else:
        low = siglip.clean_vision_config(config["vision_config"])
        high = sam.clean_vision_config(config["high_res_vision_config"])
    sam.check_global_layers(high)
    return multi_modality.native_config(
        config, image_token_id, vision_config=low, high_res_vision_config=high
    )


def _original_config(native: Config, dtype: str, images: Config) -> dict[str, Any]:
    """config.json of the authors' layout for keyword arguments of DeepseekVLHybridConfig.

    It holds mean and standard deviation of the pixels of both towers.
    """
    vision, text = native["vision_config"], native["text_config"]
    high = sam.tower_params(native["high_res_vision_config"])
    high["pixel_mean"], high["pixel_std"] = (images[f"high_res_image_{k}"] for k in ("mean", "std"))
    low = siglip.tower_params(vision)
    low["pixel_mean"], low["pixel_std"] = images["image_mean"], images["image_std"]
    low["ckpt_path"] = ""
    low["output_dim"] = vision["hidden_size"]
    towers = {"concat_type": "tuple", "high_res_cfg": high, "low_res_cfg": low}
    return multi_modality.original_config(
        native,
        dtype,
        vision_config=multi_modality.module_config("HybridVisionTower", "vision", **towers),
        aligner_config=multi_modality.aligner_config(
            vision["hidden_size"], text["hidden_size"], kind=PROJECTOR
        ),
    )


def _pixels(folder: Path, raw: Config, native: Config) -> Pixels:
    """Both towers get one padded square; SigLIP's is downscaled in floats before normalisation.

    The border of the square has the mean colour of the SAM tower.
    """
    low_size = native["vision_config"]["image_size"]
    high_size = native["high_res_vision_config"]["image_size"]
    settings = read_settings(folder, high_size, mean=CLIP_MEAN, normalise=False)
    means_and_stds = _means_and_stds(folder, raw)
    high_mean, high_std, low_mean, low_std = means_and_stds
    if not multi_modality.is_original(raw):
        settings = replace(settings, mean=tuple(high_mean), std=tuple(high_std), normalise=False)

    def inputs(views: Sequence[Views], tiles: Sequence[Tiles]) -> dict[str, Tensor]:  # noqa: ARG001
        squares = torch.cat([of_image for (of_image,) in views])
        low = F.interpolate(
            squares, (low_size, low_size), mode="bilinear", align_corners=False, antialias=True
        )
        return {
            "pixel_values": normalised(low, low_mean, low_std),
            "high_res_pixel_values": normalised(squares, high_mean, high_std),
        }

    fingerprint = repr((asdict(settings), low_size, *means_and_stds))
    square = square_pixels(settings, deepseek_vl.image_tokens(native), "DeepseekVLHybrid")
    written = square.files["transformers"]
    preprocessor = {
        **written[PREPROCESSOR_FILE],
        "do_normalize": True,
        "image_mean": list(low_mean),
        "image_std": list(low_std),
        "high_res_image_mean": list(high_mean),
        "high_res_image_std": list(high_std),
        "size": {"height": low_size, "width": low_size},
        "high_res_size": written[PREPROCESSOR_FILE]["size"],
    }
    files = {**square.files, "transformers": {**written, PREPROCESSOR_FILE: preprocessor}}
    return replace(square, inputs=inputs, fingerprint=fingerprint, files=files)


def _means_and_stds(folder: Path, raw: Config) -> tuple[list[float], ...]:
    """(mean, std) of the SAM tower, then of the SigLIP tower, from where the layout has them."""
    if multi_modality.is_original(raw):
        params = raw["vision_config"]["params"]
        high, low, prefix, name = params["high_res_cfg"], params["low_res_cfg"], "pixel", "pixel"
    else:
        high = low = read_object_if_there(folder / PREPROCESSOR_FILE, PROCESSOR)
        prefix, name = "high_res_image", "image"
    return (
        high.get(f"{prefix}_mean", list(CLIP_MEAN)),
        high.get(f"{prefix}_std", list(CLIP_STD)),
        low.get(f"{name}_mean", list(HALF)),
        low.get(f"{name}_std", list(HALF)),
    )


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


FAMILY = replace(
    deepseek_vl.FAMILY,
    name="deepseek_vl_hybrid",
    title="DeepSeek-VL (SAM and SigLIP towers)",
    model_types={multi_modality.MODEL_TYPE: "original", "deepseek_vl_hybrid": "transformers"},
    matches=_matches,
    class_name="transformers:DeepseekVLHybridForConditionalGeneration",
    parts=Parts(
        vision=(
            "model.vision_model",
            "model.high_res_vision_model",
            "model.high_res_vision_neck",
            "model.high_res_vision_proj",
            "model.high_res_vision_alpha",
        ),
        aligner=("model.aligner",),
    ),
    keys=KEYS,
    native_config=_native_config,
    pixels=_pixels,
    vision_features=_vision_features,
    align=_align,
    original_config=_original_config,
)
