"""Janus-1.3B, Janus-Pro-1B and -7B: understanding of images, and drawing.

image -> SigLIP tower -> aligner (linear, GELU, linear, ...) -> Llama LLM -> text
VQ model, generation embeddings, aligner and head draw, see janus_generator.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlft.errors import CheckpointError
from vlft.families import deepseek_vl, multi_modality, siglip
from vlft.families.base import Config, Parts, Pixels, Roles, known_fields
from vlft.families.janus_generator import GENERATOR
from vlft.families.keymap import KeyMap, KeyRule
from vlft.families.multi_modality import LLAMA_KEYS, aligner_config, module_config
from vlft.families.pixels import read_settings, square_pixels
from vlft.families.schemas import TOKENS
from vlft.files import read_object_if_there, read_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PLAIN_ROLES = ("User", "Assistant")
TOKEN_ROLES = ("<|User|>", "<|Assistant|>")
# transformers_version in the published config.json of Janus-1.3B and of Janus-Pro -> their roles.
VERSIONS: Mapping[str, tuple[str, str]] = {"4.38.2": PLAIN_ROLES, "4.33.1": TOKEN_ROLES}
# Janus-1.3B and Janus-Pro-1B are of the same sizes.
PRO_7B_WIDTH = 4096

# Defaults of JanusVisionConfig and JanusVQVAEConfig, which a config.json may leave out.
VISION_FIELDS: Mapping[str, Any] = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_channels": None,
    "image_size": 384, "patch_size": 16, "hidden_act": None, "layer_norm_eps": None,
    "mlp_ratio": 4.0, "attention_bias": None, "projection_dim": 2048, "use_qk_norm": None,
    "depth": 2, "num_image_tokens": 576,
}  # fmt: skip
VQ_FIELDS: Mapping[str, Any] = {
    "embed_dim": 8, "num_embeddings": 16384, "double_latent": None, "latent_channels": 256,
    "in_channels": None, "base_channels": 128, "channel_multiplier": [1, 1, 2, 2, 4],
    "num_res_blocks": 2, "out_channels": None, "projection_dim": 2048, "num_hidden_layers": 2,
    "hidden_act": None, "image_token_embed_dim": 2048,
}  # fmt: skip

# Params of the authors' gen_vision_config -> fields of JanusVQVAEConfig.
VQ_NAMES: Mapping[str, str] = {
    "image_token_size": "num_embeddings", "n_embed": "embed_dim", "ch": "base_channels",
    "ch_mult": "channel_multiplier", "z_channels": "latent_channels",
    "num_res_blocks": "num_res_blocks",
}  # fmt: skip
# Sizes of the authors' VQ-16, which published config.json files leave out.
VQ_SIZES: Mapping[str, Any] = {
    "ch": 128, "ch_mult": [1, 1, 2, 2, 4], "z_channels": 256, "num_res_blocks": 2,
}  # fmt: skip
# Largest number of linear layers in an aligner; published ones have two.
DEEPEST_ALIGNER = 8


def _aligner_rules(original: str, native: str) -> list[KeyRule]:
    """The original numbers its GELUs too, so that its linear layers have even numbers."""
    names = ["fc1", *(f"hidden_layers.{number}" for number in range(DEEPEST_ALIGNER - 1))]
    return [
        KeyRule(f"{original}.layers.{2 * number}.{{p}}", (f"{native}.{name}.{{p}}",))
        for number, name in enumerate(names)
    ]


def _coder_rules(original: str, native: str, levels: str) -> list[KeyRule]:
    """Encoder or decoder of the VQ model; ``levels`` is down or up."""
    blocks, level = f"{original}.conv_blocks.{{i}}", f"{native}.{levels}.{{i}}"
    middle = (("0", "block_1"), ("1", "attn_1"), ("2", "block_2"))
    return [
        KeyRule(f"{blocks}.res.{{rest}}", (f"{level}.block.{{rest}}",)),
        KeyRule(f"{blocks}.{{rest}}", (f"{level}.{{rest}}",)),
        *(
            KeyRule(f"{original}.mid.{number}.{{rest}}", (f"{native}.mid.{name}.{{rest}}",))
            for number, name in middle
        ),
        KeyRule(f"{original}.{{leaf}}.{{p}}", (f"{native}.{{leaf}}.{{p}}",)),
    ]


KEYS = KeyMap(
    [
        *siglip.key_rules(
            "vision_model.vision_tower", "model.vision_model", attention_output="projection_layer"
        ),
        *_aligner_rules("aligner", "model.aligner"),
        *_aligner_rules("gen_aligner", "model.generation_aligner"),
        *_coder_rules("gen_vision_model.encoder", "model.vqmodel.encoder", "down"),
        *_coder_rules("gen_vision_model.decoder", "model.vqmodel.decoder", "up"),
        KeyRule("gen_vision_model.{rest}", ("model.vqmodel.{rest}",)),
        KeyRule("gen_embed.{p}", ("model.generation_embeddings.{p}",)),
        KeyRule("gen_head.output_mlp_projector.{p}", ("model.generation_head.proj_out.{p}",)),
        KeyRule("gen_head.vision_head.{p}", ("model.generation_head.vision_head.{p}",)),
        *LLAMA_KEYS,
    ],
    unused=[
        "vision_model.vision_tower.attn_pool.{rest}",
        "gen_vision_model.quantize.codebook_used",
    ],
)


def _matches(config: Config) -> bool:
    """Whether the model also generates images: its config.json describes those parts."""
    return any(key.startswith("gen_") for key in config)


def roles(folder: Path, config: Config) -> Roles:
    """How the chat text names user and assistant: Janus-1.3B in words, Janus-Pro in tokens.

    A chat template in the folder decides. Without one, no field says it: signs are what differs
    between the published checkpoints and survives when their weights are saved again.
    """
    template = _chat_template(folder) or ""
    for names in (TOKEN_ROLES, PLAIN_ROLES):
        if all(name in template for name in names):
            return Roles(names)
    signs = _signs(config)
    found = "no chat template; " + (", ".join(signs) or "no sign of Janus-1.3B or Janus-Pro")
    kinds = set(signs.values())
    return Roles(kinds.pop() if len(kinds) == 1 else None, found)


def _signs(config: Config) -> dict[str, tuple[str, str]]:
    """What in config.json is true of Janus-1.3B or of Janus-Pro alone -> the roles of these."""
    signs = {}
    if config.get("model_type") == "janus":
        signs["model_type janus"] = TOKEN_ROLES
        return signs
    version = str(config.get("transformers_version"))
    if version in VERSIONS:
        signs[f"transformers_version {version}"] = VERSIONS[version]
    text = known_fields(config.get("language_config") or {}, multi_modality.LLAMA_FIELDS)
    if text["hidden_size"] == PRO_7B_WIDTH:
        signs[f"hidden_size {PRO_7B_WIDTH}"] = TOKEN_ROLES
    return signs


def _native_config(config: Config, image_token_id: int) -> dict[str, Any]:
    """Keyword arguments of JanusConfig."""
    if multi_modality.is_original(config):
        return _native_config_of_original(config, image_token_id)
    return multi_modality.native_config(
        config,
        image_token_id,
        vision_config=known_fields(config["vision_config"], VISION_FIELDS),
        vq_config=known_fields(config["vq_config"], VQ_FIELDS),
    )


def _native_config_of_original(config: Config, image_token_id: int) -> dict[str, Any]:
    """Keyword arguments of JanusConfig for a config.json of the authors."""
    native = multi_modality.native_config(config, image_token_id)
    hidden_size = native["text_config"]["hidden_size"]
    tower = siglip.vision_config((config.get("vision_config") or {}).get("params") or {})
    aligner = _aligner(config, "aligner_config", tower["hidden_size"], hidden_size)
    native["vision_config"] = {
        **{key: value for key, value in tower.items() if key in VISION_FIELDS},
        "mlp_ratio": tower["intermediate_size"] / tower["hidden_size"],
        "projection_dim": aligner["n_embed"],
        "depth": aligner["depth"],
        "num_image_tokens": (tower["image_size"] // tower["patch_size"]) ** 2,
    }
    return {**native, "vq_config": _vq_config(config, hidden_size)}


def _original_config(native: Config, dtype: str, images: Config) -> dict[str, Any]:  # noqa: ARG001
    """config.json of the authors' layout for keyword arguments of JanusConfig."""
    vision, vq = native["vision_config"], native["vq_config"]
    intermediate = round(vision["hidden_size"] * vision["mlp_ratio"])
    tower = siglip.tower_params({**vision, "intermediate_size": intermediate})
    vq_params = {key: vq[name] for key, name in VQ_NAMES.items()}
    head = {
        "image_token_embed": vq["projection_dim"],
        "image_token_size": vq["num_embeddings"],
        "n_embed": vq["image_token_embed_dim"],
    }
    return multi_modality.original_config(
        native,
        dtype,
        vision_config=module_config("CLIPVisionTower", "vision", **tower),
        aligner_config=aligner_config(
            vision["hidden_size"], vision["projection_dim"], depth=vision["depth"]
        ),
        gen_aligner_config=aligner_config(
            vq["embed_dim"], vq["projection_dim"], name="gen_aligner", depth=vq["num_hidden_layers"]
        ),
        gen_head_config=module_config("vision_head", "gen_head", **head),
        gen_vision_config=module_config(
            "VQ-16",
            "gen_vision",
            **{k: v for k, v in vq_params.items() if k not in VQ_SIZES or v != VQ_SIZES[k]},
        ),
    )


def _pixels(folder: Path, raw: Config, native: Config) -> Pixels:  # noqa: ARG001
    """As the authors' VLMImageProcessor with the settings of preprocessor_config.json."""
    vision = native["vision_config"]
    settings = read_settings(folder, vision["image_size"])
    return square_pixels(settings, vision["num_image_tokens"], "Janus")


def _chat_template(folder: Path) -> str | None:
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        return read_text(plain)
    for name in ("chat_template.json", "tokenizer_config.json"):
        stated = read_object_if_there(folder / name, TOKENS).get("chat_template")
        if isinstance(stated, str):
            return stated
    return None


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
    sizes = {"n_embed": 8, "image_token_size": 16384, **VQ_SIZES}
    return {
        **{VQ_NAMES[key]: vision.get(key, value) for key, value in sizes.items()},
        "projection_dim": aligner["n_embed"],
        "num_hidden_layers": aligner["depth"],
        "image_token_embed_dim": head.get("n_embed", hidden_size),
    }


# The tower and the aligner are called as in DeepSeek-VL.
FAMILY = replace(
    deepseek_vl.FAMILY,
    name="janus",
    title="Janus",
    model_types={multi_modality.MODEL_TYPE: "original", "janus": "transformers"},
    matches=_matches,
    class_name="transformers:JanusForConditionalGeneration",
    added_tokens=("<｜▁pad▁｜>",),
    image_border=("<begin_of_image>", "<end_of_image>"),
    roles=roles,
    roles_by_kind={"words": PLAIN_ROLES, "tokens": TOKEN_ROLES},
    parts=Parts(
        vision=("model.vision_model",),
        aligner=("model.aligner",),
        other=(
            "model.vqmodel",
            "model.generation_embeddings",
            "model.generation_aligner",
            "model.generation_head",
        ),
    ),
    keys=KEYS,
    native_config=_native_config,
    pixels=_pixels,
    original_config=_original_config,
    generator=GENERATOR,
)
