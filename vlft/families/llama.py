"""The Llama language model of DeepSeek-VL and Janus: its settings, as an allow-list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings",
    "initializer_range", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "attention_bias", "mlp_bias",
)  # fmt: skip

# LlamaConfig's defaults when the checkpoints were published; their config.json relies on them.
DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of LlamaConfig; token ids, attention hints and the like are left out."""
    known = {key: config[key] for key in FIELDS if config.get(key) is not None}
    return {"model_type": "llama", **DEFAULTS, **known}


def clean_text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``text_config`` and ``tie_word_embeddings`` of a config.json of transformers' layout.

    Without the field transformers' classes would tie; the text config knows better.
    """
    language = text_config(config["text_config"])
    tied = config.get("tie_word_embeddings", language["tie_word_embeddings"])
    return {
        "text_config": {**language, "tie_word_embeddings": tied},
        "tie_word_embeddings": tied,
    }


def language_config(text: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The authors' language_config for keyword arguments of LlamaConfig."""
    kept = {key: value for key, value in text.items() if key != "rope_parameters"}
    rope = dict(text.get("rope_parameters") or {})
    if "rope_theta" in rope:
        kept["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        kept["rope_scaling"] = rope
    return {**kept, "torch_dtype": dtype}
