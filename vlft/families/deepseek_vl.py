"""DeepSeek-VL with one SigLIP tower: deepseek-vl-1.3b-base and -chat, and the tiny model.

image -> SigLIP tower -> aligner (linear, GELU, linear) -> Llama LLM
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft.errors import CheckpointError
from vlft.families import chat_text, multi_modality, siglip
from vlft.families.base import Config, Family, Parts, Pixels
from vlft.families.keymap import KeyMap, KeyRule
from vlft.families.pixels import read_settings, square_pixels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from vlft.data.encode import Tiles

SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)

KEYS = KeyMap(
    [
        *siglip.key_rules("vision_model.vision_tower", "model.vision_model"),
        KeyRule("aligner.layers.0.{p}", ("model.aligner.linear1.{p}",)),
        KeyRule("aligner.layers.2.{p}", ("model.aligner.linear2.{p}",)),
        *multi_modality.LLAMA_KEYS,
    ],
    unused=["vision_model.vision_tower.attn_pool.{rest}"],
)


def _matches(config: Config) -> bool:
    """Whether the model has one SigLIP tower and, unlike Janus, does not generate images."""
    tower = (config.get("vision_config") or {}).get("cls", "CLIPVisionTower")
    return tower == "CLIPVisionTower" and not any(key.startswith("gen_") for key in config)


def _native_config(config: Config, image_token_id: int) -> dict[str, Any]:
    """Keyword arguments of DeepseekVLConfig."""
    if multi_modality.is_original(config):
        check_aligner(config, "mlp_gelu")
        tower = siglip.vision_config(config["vision_config"].get("params") or {})
    else:
        tower = siglip.clean_vision_config(config["vision_config"])
    return multi_modality.native_config(config, image_token_id, vision_config=tower)


def _original_config(native: Config, dtype: str, images: Config) -> dict[str, Any]:  # noqa: ARG001
    """config.json of the authors' layout for keyword arguments of DeepseekVLConfig."""
    text, vision = native["text_config"], native["vision_config"]
    tower = siglip.tower_params(vision)
    return multi_modality.original_config(
        native,
        dtype,
        vision_config=multi_modality.module_config("CLIPVisionTower", "vision", **tower),
        aligner_config=multi_modality.aligner_config(vision["hidden_size"], text["hidden_size"]),
    )


def image_tokens(native: Config) -> int:
    """Tokens per image: one per patch of the SigLIP tower."""
    vision = native["vision_config"]
    return int(vision["image_size"] // vision["patch_size"]) ** 2


def _pixels(folder: Path, raw: Config, native: Config) -> Pixels:  # noqa: ARG001
    """As the authors' VLMImageProcessor with the settings of preprocessor_config.json."""
    settings = read_settings(folder, native["vision_config"]["image_size"])
    return square_pixels(settings, image_tokens(native), "DeepseekVL")


def _align(model: nn.Module, features: Tensor, tiles: Sequence[Tiles]) -> Tensor:  # noqa: ARG001
    """(I * T, D) features that replace the image tokens, for (I, T, W) features of the tower."""
    aligned: Tensor = model.model.aligner(features)  # type: ignore[union-attr, operator]
    return aligned.flatten(0, 1)


def check_aligner(config: Config, kind: str) -> None:
    """Raises CheckpointError for an aligner that transformers' class does not have."""
    params = (config.get("aligner_config") or {}).get("params") or {}
    found = (params.get("projector_type", kind), params.get("depth", 2))
    if found != (kind, 2):
        raise CheckpointError(
            f"aligner {found[0]!r} of depth {found[1]}; transformers' class has {kind} of "
            "depth 2 only",
            hint="this checkpoint cannot be loaded",
        )


FAMILY = Family(
    name="deepseek_vl",
    title="DeepSeek-VL (SigLIP tower)",
    model_types={multi_modality.MODEL_TYPE: "original", "deepseek_vl": "transformers"},
    matches=_matches,
    class_name="transformers:DeepseekVLForConditionalGeneration",
    chat_text=chat_text.as_a_whole,
    template="deepseek_vl.jinja",
    image_tag=multi_modality.IMAGE_TAG,
    system_prompt=SYSTEM_PROMPT,
    parts=Parts(vision=("model.vision_model",), aligner=("model.aligner",)),
    keys=KEYS,
    native_config=_native_config,
    pixels=_pixels,
    vision_features=siglip.vision_features,
    align=_align,
    original_config=_original_config,
)
