"""DeepSeek-VL2: deepseek-vl2-tiny, -small and (base) deepseek-vl2.

image -> whole view and tiles -> SigLIP tower -> projector -> mixture-of-experts LLM
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft.errors import CheckpointError
from vlft.families import chat_text, siglip
from vlft.families.base import Config, Family, Parts, Pixels, Roles
from vlft.families.keymap import KeyMap, KeyRule
from vlft.families.pixels import HALF
from vlft.families.schemas import PROCESSOR
from vlft.families.tiles import Tiling, tiled_pixels
from vlft.files import read_object_if_there

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from vlft.data.encode import Tiles

IMAGE_TAG = "<image>"
ROLES = ("<|User|>", "<|Assistant|>")
# In the order in which the authors' processor adds them to a tokenizer that lacks them.
ADDED_TOKENS = (
    "<｜▁pad▁｜>", IMAGE_TAG, "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", *ROLES,
)  # fmt: skip

# Defaults of the authors' DeepseekV2Config; transformers' class of that name has others.
TEXT_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008,
    "moe_intermediate_size": 1407, "num_hidden_layers": 30, "num_attention_heads": 32,
    "num_key_value_heads": 32, "n_shared_experts": None, "n_routed_experts": None,
    "routed_scaling_factor": 1.0, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": None,
    "n_group": None, "topk_group": None, "num_experts_per_tok": None, "first_k_dense_replace": 0,
    "norm_topk_prob": False, "scoring_func": "softmax", "hidden_act": "silu",
    "max_position_embeddings": 2048, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "rope_theta": 10000.0, "rope_scaling": None,
    "attention_bias": False, "use_mla": True,
}  # fmt: skip
NULLABLE = ("q_lora_rank", "rope_scaling", "n_group", "topk_group")
ARCHITECTURE = "DeepseekVLV2ForCausalLM"
TOWER = "siglip_so400m_patch14_384"
PROJECTOR = "downsample_mlp_gelu"


def _expert_rules() -> list[KeyRule]:
    original = "language.model.layers.{i}.mlp.experts.{e}"
    native = "model.language_model.layers.{i}.mlp.experts"
    both = (f"{native}.gate_up_proj",)
    return [
        KeyRule(f"{original}.gate_proj.weight", both, "stack", (0, 2)),
        KeyRule(f"{original}.up_proj.weight", both, "stack", (1, 2)),
        KeyRule(f"{original}.down_proj.weight", (f"{native}.down_proj",), "stack"),
    ]


KEYS = KeyMap(
    [
        *siglip.key_rules("vision", "model.vision_model"),
        KeyRule("projector.{rest}", ("model.projector.{rest}",)),
        KeyRule("image_newline", ("model.image_newline",)),
        KeyRule("view_seperator", ("model.view_separator",)),
        *_expert_rules(),
        KeyRule("language.model.{rest}", ("model.language_model.{rest}",)),
        KeyRule("language.lm_head.{p}", ("lm_head.{p}",)),
    ],
    unused=["vision.attn_pool.{rest}"],
)


def _matches(config: Config) -> bool:
    """Tells DeepSeek-VL2 from DeepSeek-OCR, which has the same model_type."""
    tower = (config.get("vision_config") or {}).get("model_name", TOWER)
    return ARCHITECTURE in (config.get("architectures") or ()) or tower.startswith("siglip")


def _native_config(config: Config, image_token_id: int) -> dict[str, Any]:
    """Keyword arguments of DeepseekVL2Config for a config.json of the authors."""
    text = _text_config(config["language_config"])
    projector = config.get("projector_config") or {}
    _check_projector(projector, text["hidden_size"])
    _check("tile_tag", config.get("tile_tag", "2D"), ("2D",))
    view_first = config.get("global_view_pos", "head")
    _check("global_view_pos", view_first, ("head", "tail"))
    stated = config.get("vision_config") or {}
    vision = siglip.vision_config({"model_name": TOWER, **stated})
    return {
        "text_config": text,
        "vision_config": {**vision, "hidden_act": "gelu_pytorch_tanh"},
        "image_token_id": image_token_id,
        "downsample_ratio": projector.get("downsample_ratio", 2),
        "projector_depth": projector.get("depth", 2),
        "projector_mlp_ratio": projector.get("mlp_ratio", 1),
        "global_view_first": view_first == "head",
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


def _pixels(folder: Path, raw: Config, native: Config) -> Pixels:
    """As the authors' DeepseekVLV2Processor with the settings of processor_config.json."""
    path = folder / "processor_config.json"
    stated = read_object_if_there(path, PROCESSOR)
    vision = native["vision_config"]
    candidates = stated.get("candidate_resolutions") or raw.get("candidate_resolutions")
    size = vision["image_size"]
    for width, height in candidates or ():
        if width % size or height % size:
            raise CheckpointError(
                f"candidate resolution {width} x {height} is no multiple of the tower's {size}",
                place=str(path),
            )
    side = -(-(size // vision["patch_size"]) // native["downsample_ratio"])
    tiling = Tiling(
        size=size,
        candidates=tuple((width, height) for width, height in candidates or [(size, size)]),
        side=side,
        mean=tuple(stated.get("image_mean", HALF)),
        std=tuple(stated.get("image_std", HALF)),
        normalise=stated.get("normalize", True),
    )
    return tiled_pixels(tiling)


def _align(model: nn.Module, features: Tensor, tiles: Sequence[Tiles]) -> Tensor:
    """(R, D) for (V, T, W) features of the tower; newlines and separators are included."""
    parts: Any = model.model
    aligned: Tensor = parts.arrange(parts.projector(features), tiles)
    return aligned


def _text_config(config: Config) -> dict[str, Any]:
    stated = {key: value for key, value in config.items() if key in TEXT_DEFAULTS}
    text = {**TEXT_DEFAULTS, **{k: v for k, v in stated.items() if v is not None or k in NULLABLE}}
    _check("topk_method", text["topk_method"], ("greedy", "group_limited_greedy", "noaux_tc"))
    _check("scoring_func", text["scoring_func"], ("softmax", "sigmoid"))
    if text["use_mla"]:
        # Latent attention has keys and values for each head; the authors' code ignores the field.
        text["num_key_value_heads"] = text["num_attention_heads"]
    return {key: value for key, value in text.items() if value is not None or key in NULLABLE}


def _check(name: str, found: Any, allowed: tuple[Any, ...]) -> None:
    if found not in allowed:
        raise CheckpointError(
            f"{name} {found!r}",
            hint=f"allowed: {', '.join(map(str, allowed))}; this checkpoint cannot be loaded",
        )


def _check_projector(projector: Config, hidden_size: int) -> None:
    _check("projector_type", projector.get("projector_type", PROJECTOR), (PROJECTOR,))
    _check("token_pooling", projector.get("token_pooling", False), (False,))
    _check("projector n_embed", projector.get("n_embed", 2048), (hidden_size,))


FAMILY = Family(
    name="deepseek_vl2",
    title="DeepSeek-VL2",
    model_types={"deepseek_vl_v2": "original"},
    matches=_matches,
    # Of vlft, because transformers has none.
    class_name="vlft.models.deepseek_vl2:DeepseekVL2ForConditionalGeneration",
    chat_text=chat_text.by_message,
    template="deepseek_vl2.jinja",
    image_tag=IMAGE_TAG,
    added_tokens=ADDED_TOKENS,
    has_boxes=True,
    # The router bias: rounding it can change which experts are chosen.
    keep_dtype_suffixes=("e_score_correction_bias",),
    roles=lambda *_: Roles(ROLES),
    system_prompt="",
    parts=Parts(
        vision=("model.vision_model",),
        aligner=("model.projector", "model.image_newline", "model.view_separator"),
    ),
    attention_inputs=(
        "q_proj", "k_proj", "v_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    ),
    keys=KEYS,
    native_config=_native_config,
    pixels=_pixels,
    vision_features=siglip.vision_features,
    align=_align,
)  # fmt: skip
