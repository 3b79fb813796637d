"""DeepSeek-VL and Janus: config.json of their class MultiModalityCausalLM, and its Llama LLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft.families.base import known_fields
from vlft.families.keymap import KeyRule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlft.families.base import Config

# model_type in config.json of the authors' layout.
MODEL_TYPE = "multi_modality"
IMAGE_TAG = "<image_placeholder>"

# LlamaConfig's defaults when the checkpoints were published; their config.json relies on them.
LLAMA_FIELDS: Mapping[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "vocab_size": 32000, "tie_word_embeddings": False, "num_key_value_heads": None,
    "head_dim": None, "hidden_act": None, "initializer_range": None, "rope_theta": None,
    "rope_scaling": None, "rope_parameters": None, "attention_bias": None, "mlp_bias": None,
}  # fmt: skip

LLAMA_KEYS = (
    KeyRule("language_model.model.{rest}", ("model.language_model.{rest}",)),
    KeyRule("language_model.lm_head.{p}", ("lm_head.{p}",)),
)


def is_original(config: Config) -> bool:
    """Whether a config.json is of the authors' layout."""
    return config.get("model_type") == MODEL_TYPE


def native_config(config: Config, image_token_id: int, **others: Any) -> dict[str, Any]:
    """Keyword arguments of the config of transformers' class, for a config.json of either layout.

    ``others`` are the keyword arguments that do not concern the LLM.
    """
    language = config["language_config" if is_original(config) else "text_config"]
    text = {"model_type": "llama", **known_fields(language, LLAMA_FIELDS)}
    if not is_original(config):
        # Without the field transformers' classes would tie; the text config knows better.
        text["tie_word_embeddings"] = config.get("tie_word_embeddings", text["tie_word_embeddings"])
    shared = {"image_token_id": image_token_id, "tie_word_embeddings": text["tie_word_embeddings"]}
    return {"text_config": text, **others, **shared}


def original_config(native: Config, dtype: str, **others: Any) -> dict[str, Any]:
    """config.json of the authors' layout; ``others`` are its entries besides the LLM."""
    text = native["text_config"]
    language = {key: value for key, value in text.items() if key != "rope_parameters"}
    rope = dict(text.get("rope_parameters") or {})
    if "rope_theta" in rope:
        language["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        language["rope_scaling"] = rope
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": MODEL_TYPE,
        "torch_dtype": dtype,
        **others,
        "language_config": {**language, "torch_dtype": dtype},
    }


def module_config(cls: str, model_type: str, **params: Any) -> dict[str, Any]:
    """Entry of the authors' config.json for a module that is not the LLM."""
    return {"cls": cls, "model_type": model_type, "params": params}


def aligner_config(
    inputs: int, outputs: int, *, name: str = "aligner", depth: int = 2, kind: str = "mlp_gelu"
) -> dict[str, Any]:
    """The authors' config of an aligner between these widths; depth counts linear layers."""
    sizes = {"depth": depth, "input_dim": inputs, "n_embed": outputs}
    return module_config("MlpProjector", name, **sizes, projector_type=kind)
