"""DeepSeek-VL with one SigLIP tower: deepseek-vl-1.3b-base and -chat, and the tiny model.

image -> SigLIP tower -> aligner (linear, GELU, linear) -> Llama LLM
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft.errors import CheckpointError
from vlft.families import llama, siglip
from vlft.families.base import Config, Family, Parts, Pixels, TransformersLayout, from_transformers
from vlft.families.keymap import KeyMap, KeyRule
from vlft.families.pixels import read_settings, square_files, square_pixels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from vlft.families.base import Tiles

IMAGE_TAG = "<image_placeholder>"
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
        KeyRule("language_model.model.{rest}", ("model.language_model.{rest}",)),
        KeyRule("language_model.lm_head.{p}", ("lm_head.{p}",)),
    ],
    unused=["vision_model.vision_tower.attn_pool.{rest}"],
)


def _matches(config: Config) -> bool:
    """Whether the model has one SigLIP tower and, unlike Janus, does not generate images."""
    if config.get("model_type") == "deepseek_vl":
        return True
    vision = config.get("vision_config") or {}
    return vision.get("cls", "CLIPVisionTower") == "CLIPVisionTower" and not any(
        key.startswith("gen_") for key in config
    )


def _native_config(config: Config, image_token_id: int) -> dict[str, Any]:
    """Keyword arguments of DeepseekVLConfig for a config.json of the authors."""
    check_aligner(config, "mlp_gelu")
    language = llama.text_config(config["language_config"])
    return {
        "text_config": language,
        "vision_config": siglip.vision_config(config["vision_config"].get("params") or {}),
        "image_token_id": image_token_id,
        "tie_word_embeddings": language["tie_word_embeddings"],
    }


def _native_config_of_transformers(config: Config, image_token_id: int) -> dict[str, Any]:
    """Keyword arguments of DeepseekVLConfig for a config.json of transformers' layout."""
    return {
        **llama.clean_text_config(config),
        "vision_config": siglip.clean_vision_config(config["vision_config"]),
        "image_token_id": image_token_id,
    }


def _original_config(native: Config, dtype: str) -> dict[str, Any]:
    """config.json of the authors' layout for keyword arguments of DeepseekVLConfig."""
    text, vision = native["text_config"], native["vision_config"]
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": dtype,
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": siglip.tower_params(vision),
        },
        "aligner_config": aligner_config(vision["hidden_size"], text["hidden_size"]),
        "language_config": llama.language_config(text, dtype),
    }


def image_tokens(native: Config) -> int:
    """Tokens per image: one per patch of the SigLIP tower."""
    vision = native["vision_config"]
    return int(vision["image_size"] // vision["patch_size"]) ** 2


def _pixels(folder: Path, raw: Config, native: Config) -> Pixels:  # noqa: ARG001
    """As the authors' VLMImageProcessor with the settings of preprocessor_config.json."""
    settings = read_settings(folder, native["vision_config"]["image_size"])
    return square_pixels(settings, image_tokens(native))


def _processor_files(
    folder: Path,
    raw: Config,  # noqa: ARG001
    native: Config,
    layout: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """preprocessor_config.json and processor_config.json of a layout."""
    settings = read_settings(folder, native["vision_config"]["image_size"])
    tokens = image_tokens(native)
    return square_files(settings, tokens, layout, image_tag=IMAGE_TAG, native="DeepseekVL")


def vision_features(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(I, T, W) features of the tower for (I, 3, H, W) pixels."""
    features: Tensor = model.model.vision_model(**inputs).last_hidden_state  # type: ignore[union-attr, operator]
    return features


def align(model: nn.Module, features: Tensor, tiles: Sequence[Tiles]) -> Tensor:  # noqa: ARG001
    """(I * T, D) features that replace the image tokens, for (I, T, W) features of the tower."""
    aligned: Tensor = model.model.aligner(features)  # type: ignore[union-attr, operator]
    return aligned.flatten(0, 1)


def aligner_config(
    inputs: int,
    outputs: int,
    *,
    name: str = "aligner",
    depth: int = 2,
    kind: str = "mlp_gelu",
) -> dict[str, Any]:
    """The authors' config of an aligner between these widths; depth counts linear layers."""
    return {
        "cls": "MlpProjector",
        "model_type": name,
        "params": {
            "depth": depth,
            "input_dim": inputs,
            "n_embed": outputs,
            "projector_type": kind,
        },
    }


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
    model_types={"multi_modality": "original", "deepseek_vl": "transformers"},
    matches=_matches,
    template="deepseek_vl.jinja",
    image_tag=IMAGE_TAG,
    system_prompt=SYSTEM_PROMPT,
    parts=Parts(
        vision=("model.vision_model",),
        aligner=("model.aligner",),
        language="model.language_model",
        head="lm_head",
    ),
    attention_inputs=("q_proj", "k_proj", "v_proj"),
    keys=KEYS,
    model_class=from_transformers("DeepseekVLForConditionalGeneration"),
    native_config=_native_config,
    pixels=_pixels,
    vision_features=vision_features,
    align=align,
    transformers_layout=TransformersLayout(
        native_config=_native_config_of_transformers,
        original_config=_original_config,
        processor_files=_processor_files,
    ),
)
