"""Janus-1.3B, Janus-Pro-1B and -7B: image understanding; the generation parts stay unchanged.

image -> SigLIP tower -> aligner (linear, GELU, linear, ...) -> Llama LLM -> text
                        VQ model, generation embeddings, aligner, head (unused here)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft.errors import CheckpointError
from vlft.families import llama, siglip
from vlft.families.base import Config, Family, Parts, Pixels, TransformersLayout, from_transformers
from vlft.families.deepseek_vl import (
    IMAGE_TAG,
    SYSTEM_PROMPT,
    align,
    aligner_config,
    vision_features,
)
from vlft.families.janus_keys import DEEPEST_ALIGNER, KEYS
from vlft.families.pixels import read_settings, square_files, square_pixels
from vlft.files import read_object_if_there

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PLAIN_ROLES = ("User", "Assistant")
TOKEN_ROLES = ("<|User|>", "<|Assistant|>")

VISION_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size", "hidden_act", "layer_norm_eps", "mlp_ratio", "attention_bias", "projection_dim",
    "use_qk_norm", "depth", "num_image_tokens",
)  # fmt: skip
VQ_FIELDS = (
    "embed_dim", "num_embeddings", "double_latent", "latent_channels", "in_channels",
    "base_channels", "channel_multiplier", "num_res_blocks", "out_channels", "projection_dim",
    "num_hidden_layers", "hidden_act", "image_token_embed_dim",
)  # fmt: skip

# Defaults of JanusVisionConfig and JanusVQVAEConfig, which a config.json may leave out.
VISION_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 384,
    "patch_size": 16, "mlp_ratio": 4.0, "projection_dim": 2048, "depth": 2,
    "num_image_tokens": 576,
}  # fmt: skip
VQ_DEFAULTS: Mapping[str, Any] = {
    "embed_dim": 8, "num_embeddings": 16384, "latent_channels": 256, "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 2, "projection_dim": 2048,
    "num_hidden_layers": 2, "image_token_embed_dim": 2048,
}  # fmt: skip

# Sizes of the authors' VQ-16, which published config.json files leave out.
VQ_SIZES: Mapping[str, Any] = {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "z_channels": 256}


def _matches(config: Config) -> bool:
    """Whether the model also generates images: its config.json describes those parts."""
    return config.get("model_type") == "janus" or any(key.startswith("gen_") for key in config)


def roles(folder: Path, config: Config) -> tuple[str, str]:
    """How the chat text names user and assistant: Janus-1.3B in words, Janus-Pro in tokens.

    A chat template in the folder decides. Without one, transformers' layout means Janus-Pro. In the
    authors' layout no field says it, so that differences between the published checkpoints decide:
    Janus-Pro has .bin weights, and its config.json was written by transformers 4.33.1.
    """
    template = _chat_template(folder) or ""
    for names in (TOKEN_ROLES, PLAIN_ROLES):
        if all(name in template for name in names):
            return names
    is_pro = (
        config.get("model_type") == "janus"
        or any(folder.glob("pytorch_model*.bin"))
        or config.get("transformers_version") == "4.33.1"
    )
    return TOKEN_ROLES if is_pro else PLAIN_ROLES


def _native_config(config: Config, image_token_id: int) -> dict[str, Any]:
    """Keyword arguments of JanusConfig for a config.json of the authors."""
    language = llama.text_config(config["language_config"])
    tower = siglip.vision_config((config.get("vision_config") or {}).get("params") or {})
    grid = tower["image_size"] // tower["patch_size"]
    aligner = _aligner(config, "aligner_config", tower["hidden_size"], language["hidden_size"])
    return {
        "text_config": language,
        "vision_config": {
            "hidden_size": tower["hidden_size"],
            "num_hidden_layers": tower["num_hidden_layers"],
            "num_attention_heads": tower["num_attention_heads"],
            "image_size": tower["image_size"],
            "patch_size": tower["patch_size"],
            "mlp_ratio": tower["intermediate_size"] / tower["hidden_size"],
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "projection_dim": aligner["n_embed"],
            "depth": aligner["depth"],
            "num_image_tokens": grid * grid,
        },
        "vq_config": _vq_config(config, language["hidden_size"]),
        "image_token_id": image_token_id,
        "tie_word_embeddings": language["tie_word_embeddings"],
    }


def _native_config_of_transformers(config: Config, image_token_id: int) -> dict[str, Any]:
    """Keyword arguments of JanusConfig for a config.json of transformers' layout."""
    return {
        **llama.clean_text_config(config),
        "vision_config": {**VISION_DEFAULTS, **_known(config["vision_config"], VISION_FIELDS)},
        "vq_config": {**VQ_DEFAULTS, **_known(config["vq_config"], VQ_FIELDS)},
        "image_token_id": image_token_id,
    }


def _original_config(native: Config, dtype: str) -> dict[str, Any]:
    """config.json of the authors' layout for keyword arguments of JanusConfig."""
    text, vision, vq = native["text_config"], native["vision_config"], native["vq_config"]
    aligner = aligner_config(vision["hidden_size"], vision["projection_dim"], depth=vision["depth"])
    intermediate = round(vision["hidden_size"] * vision["mlp_ratio"])
    sizes = {
        "ch": vq["base_channels"],
        "ch_mult": list(vq["channel_multiplier"]),
        "z_channels": vq["latent_channels"],
    }
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": dtype,
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": siglip.tower_params({**vision, "intermediate_size": intermediate}),
        },
        "aligner_config": aligner,
        "gen_aligner_config": aligner_config(
            vq["embed_dim"], vq["projection_dim"], name="gen_aligner", depth=vq["num_hidden_layers"]
        ),
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {
                "image_token_embed": vq["projection_dim"],
                "image_token_size": vq["num_embeddings"],
                "n_embed": vq["image_token_embed_dim"],
            },
        },
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {
                "image_token_size": vq["num_embeddings"],
                "n_embed": vq["embed_dim"],
                **{key: value for key, value in sizes.items() if value != VQ_SIZES[key]},
            },
        },
        "language_config": llama.language_config(text, dtype),
    }


def _pixels(folder: Path, raw: Config, native: Config) -> Pixels:  # noqa: ARG001
    """As the authors' VLMImageProcessor with the settings of preprocessor_config.json."""
    vision = native["vision_config"]
    return square_pixels(read_settings(folder, vision["image_size"]), vision["num_image_tokens"])


def _processor_files(
    folder: Path,
    raw: Config,  # noqa: ARG001
    native: Config,
    layout: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """preprocessor_config.json and processor_config.json of a layout."""
    vision = native["vision_config"]
    settings, tokens = read_settings(folder, vision["image_size"]), vision["num_image_tokens"]
    return square_files(settings, tokens, layout, image_tag=IMAGE_TAG, native="Janus")


def _chat_template(folder: Path) -> str | None:
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        return plain.read_text("utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        stated = read_object_if_there(folder / name).get("chat_template")
        if isinstance(stated, str):
            return stated
    return None


def _known(config: Config, fields: tuple[str, ...]) -> dict[str, Any]:
    return {key: config[key] for key in fields if config.get(key) is not None}


def _aligner(config: Config, key: str, inputs: int, outputs: int) -> dict[str, Any]:
    """Parameters of an aligner: ``depth`` linear layers with GELU between them."""
    params = (config.get(key) or {}).get("params") or {}
    kind = params.get("projector_type", "mlp_gelu")
    found = {
        "depth": params.get("depth", 1),
        "input_dim": params.get("input_dim", inputs),
        "n_embed": params.get("n_embed", outputs),
    }
    if kind != "mlp_gelu" or not 1 <= found["depth"] <= DEEPEST_ALIGNER:
        raise CheckpointError(
            f"{key} {kind!r} of depth {found['depth']}; supported are mlp_gelu of depth 1 "
            f"to {DEEPEST_ALIGNER}",
            hint="this checkpoint cannot be loaded",
        )
    return found


def _vq_config(config: Config, hidden_size: int) -> dict[str, Any]:
    vision = (config.get("gen_vision_config") or {}).get("params") or {}
    head = (config.get("gen_head_config") or {}).get("params") or {}
    aligner = _aligner(config, "gen_aligner_config", vision.get("n_embed", 8), hidden_size)
    if head.get("image_token_embed", hidden_size) != aligner["n_embed"]:
        raise CheckpointError(
            f"gen_head image_token_embed {head['image_token_embed']}, gen_aligner n_embed "
            f"{aligner['n_embed']}; transformers' class needs equal ones",
            hint="this checkpoint cannot be loaded",
        )
    sizes = {key: vision.get(key, value) for key, value in VQ_SIZES.items()}
    return {
        "embed_dim": vision.get("n_embed", 8),
        "num_embeddings": vision.get("image_token_size", 16384),
        "latent_channels": sizes["z_channels"],
        "base_channels": sizes["ch"],
        "channel_multiplier": list(sizes["ch_mult"]),
        "projection_dim": aligner["n_embed"],
        "num_hidden_layers": aligner["depth"],
        "image_token_embed_dim": head.get("n_embed", hidden_size),
    }


FAMILY = Family(
    name="janus",
    title="Janus",
    model_types={"multi_modality": "original", "janus": "transformers"},
    matches=_matches,
    template="deepseek_vl.jinja",
    image_tag=IMAGE_TAG,
    added_tokens=("<｜▁pad▁｜>",),
    image_border=("<begin_of_image>", "<end_of_image>"),
    roles=roles,
    system_prompt=SYSTEM_PROMPT,
    parts=Parts(
        vision=("model.vision_model",),
        aligner=("model.aligner",),
        language="model.language_model",
        head="lm_head",
        other=(
            "model.vqmodel",
            "model.generation_embeddings",
            "model.generation_aligner",
            "model.generation_head",
        ),
    ),
    attention_inputs=("q_proj", "k_proj", "v_proj"),
    keys=KEYS,
    model_class=from_transformers("JanusForConditionalGeneration"),
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
