"""DeepSeek-VL with one SigLIP tower: deepseek-vl-1.3b-base and -chat, and the tiny model.

picture -> SigLIP tower -> aligner (linear, GELU, linear) -> Llama LLM
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft.errors import CheckpointError
from vlft.families import llama, siglip
from vlft.families.base import Config, Family, Parts, Pixels
from vlft.families.keymap import KeyMap, KeyRule
from vlft.files import read_object

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

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
    _check_aligner((config.get("aligner_config") or {}).get("params") or {})
    language = llama.text_config(config["language_config"])
    return {
        "text_config": language,
        "vision_config": siglip.vision_config(config["vision_config"].get("params") or {}),
        "image_token_id": image_token_id,
        "tie_word_embeddings": language["tie_word_embeddings"],
    }


def clean_config(config: Config, image_token_id: int) -> dict[str, Any]:
    """Keyword arguments of DeepseekVLConfig for a config.json of transformers' layout."""
    language = llama.text_config(config["text_config"])
    # The class's own default ties; absent, the text config states what the weights are.
    tied = config.get("tie_word_embeddings", language["tie_word_embeddings"])
    return {
        "text_config": {**language, "tie_word_embeddings": tied},
        "vision_config": siglip.clean_vision_config(config["vision_config"]),
        "image_token_id": image_token_id,
        "tie_word_embeddings": tied,
    }


def original_config(native: Config, dtype: str) -> dict[str, Any]:
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
        "aligner_config": {
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": {
                "depth": 2,
                "input_dim": vision["hidden_size"],
                "n_embed": text["hidden_size"],
                "projector_type": "mlp_gelu",
            },
        },
        "language_config": llama.language_config(text, dtype),
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
    settings = read_object(path) if path.is_file() else {}
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
    original_config=original_config,
    processor_classes=("DeepseekVLProcessor", "DeepseekVLImageProcessor"),
    pixels=pixels,
    image_tokens=image_tokens,
    encode_images=encode_images,
)
