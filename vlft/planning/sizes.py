"""Layer shapes and parameter counts of a model, by arithmetic on its config: no module is built.

Names and shapes are those of the model's class, so that what is chosen by name (LoRA targets,
quantised weights) can be counted before there is a model.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class TextSizes:
    """Sizes of a language model, under the names of its text config.

    The routed experts' sizes are 0 without a mixture of experts, the sizes of multi-head latent
    attention (MLA) are used only with ``use_mla``, and its ``q_lora_rank`` is 0 if queries are not
    compressed.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool = False
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    n_shared_experts: int = 0
    moe_intermediate_size: int = 0
    first_k_dense_replace: int = 0
    topk_method: str = ""
    use_mla: bool = False
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0

    @property
    def query_width(self) -> int:
        """Width of the queries of all heads."""
        latent = self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.num_attention_heads * (latent if self.use_mla else self.head_dim)

    @property
    def value_width(self) -> int:
        """Width of the values of all query heads, which is that of attention's output."""
        return self.num_attention_heads * (self.v_head_dim if self.use_mla else self.head_dim)

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward part of a layer is a mixture of experts."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace


@dataclass(frozen=True)
class TowerSizes:
    """Sizes of a vision tower that the memory of encoding depends on.

    Attributes:
        image_size: side of its views, in pixels.
        width: of its hidden states.
        inner: width of its feed-forward parts.
        heads: of attention whose scores exist as a tensor, as SAM adds relative positions to them;
            0 for SigLIP, whose attention is fused.
        window: side of the windows of most layers of SAM, in patches.
    """

    image_size: int
    patch_size: int
    width: int
    inner: int
    heads: int = 0
    window: int = 0

    def numbers(self, views: int, side: int) -> float:
        """Numbers that are held at most, beside the weights, while views of a side are encoded."""
        across = side // self.patch_size
        tokens = across**2
        # The state, the normalised one, and the feed-forward part before and after its activation.
        held = tokens * (2 * self.width + 2 * self.inner)
        if self.heads:
            # A layer with global attention computes head by head, see models.adaptations. After the
            # last one: its scores; the state, the normalised one, queries, keys and values; the
            # outputs of the heads, alone, joined and reordered; and the projected one.
            held = max(held, tokens**2 + 9 * tokens * self.width)
            # A layer with windows, which pad the view: scores of all heads; the state; and padded
            # the normalised one, queries, keys and values, twice as they are reordered, and output.
            padded = (-(-across // self.window) * self.window) ** 2
            scores = self.heads * padded * self.window**2
            held = max(held, scores + (tokens + 9 * padded) * self.width)
        return float(views * held)


@dataclass(frozen=True)
class ModelSizes:
    """What the memory of a model depends on.

    Attributes:
        text: sizes of the LLM.
        other_params: parameters of all other parts: towers, aligner, image generation.
        towers: that see the images.
        attention_inputs: leaf names that ``--lora-target-modules qkv`` means.
    """

    text: TextSizes
    other_params: int
    towers: tuple[TowerSizes, ...]
    attention_inputs: tuple[str, ...]


def model_sizes(
    native: Mapping[str, Any], params: int, attention_inputs: tuple[str, ...]
) -> ModelSizes:
    """The sizes of a model, from its native config and its parameters in all (0 if unknown)."""
    text = text_sizes(native["text_config"])
    others = max(0, params - language_params(text) - lm_head_params(text))
    return ModelSizes(text, others, tower_sizes(native), attention_inputs)


def text_sizes(text: Mapping[str, Any]) -> TextSizes:
    """The sizes in the keyword arguments of a text config, where None and absence mean 0."""
    heads = text["num_attention_heads"]
    found = {"num_key_value_heads": heads, "head_dim": text["hidden_size"] // heads}
    # The config of DeepSeek-OCR's class names the kind of each layer.
    found["first_k_dense_replace"] = list(text.get("mlp_layer_types", ())).count("dense")
    names = [field.name for field in fields(TextSizes)]
    return TextSizes(**found | {name: text[name] for name in names if text.get(name)})


def language_weights(text: TextSizes, prefix: str) -> Shapes:
    """Every linear layer of the LLM, (out, in), and its experts, (E, out, in), by name."""
    hidden, experts, width = text.hidden_size, text.n_routed_experts, text.moe_intermediate_size
    shapes: Shapes = {}
    for layer in range(text.num_hidden_layers):
        name = f"{prefix}.layers.{layer}"
        parts = {"self_attn": _attention(text)}
        if text.has_experts(layer):
            shapes[f"{name}.mlp.experts.gate_up_proj"] = (experts, 2 * width, hidden)
            shapes[f"{name}.mlp.experts.down_proj"] = (experts, hidden, width)
            parts["mlp.shared_experts"] = _feed_forward(hidden, width * text.n_shared_experts)
        else:
            parts["mlp"] = _feed_forward(hidden, text.intermediate_size)
        for part, linears in parts.items():
            shapes |= {f"{name}.{part}.{leaf}": shape for leaf, shape in linears.items()}
    return shapes


def language_params(text: TextSizes) -> int:
    """Parameters of the LLM: linear layers, experts, routers, norms and embedding; no lm_head."""
    norms = 2 * text.hidden_size
    if text.use_mla:
        norms += text.kv_lora_rank + text.q_lora_rank
    # With this method a learned bias is added to the scores that select experts.
    router_inputs = text.hidden_size + (text.topk_method == "noaux_tc")
    moe_layers = sum(map(text.has_experts, range(text.num_hidden_layers)))
    routers = moe_layers * text.n_routed_experts * router_inputs
    embedding_and_last_norm = text.vocab_size * text.hidden_size + text.hidden_size
    weights = sum(prod(shape) for shape in language_weights(text, "").values())
    return weights + text.num_hidden_layers * norms + routers + embedding_and_last_norm


def lm_head_params(text: TextSizes) -> int:
    """Parameters of the vocabulary projection; 0 if it is the embedding."""
    return 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size


def tower_sizes(native: Mapping[str, Any]) -> tuple[TowerSizes, ...]:
    """The towers that see the images of a model with this native config."""
    vision = native["vision_config"]
    sam = native.get("high_res_vision_config") or vision.get("sam_config")
    towers = []
    # DeepSeek-OCR's second tower sees a sixteenth of the tokens of its first.
    if "sam_config" not in vision:
        towers.append(_tower(vision))
    if sam is not None:
        # The config of DeepSeek-OCR's tower leaves out what its class has by default.
        window = sam.get("window_size", 14)
        towers.append(_tower(sam, heads=sam["num_attention_heads"], window=window))
    return tuple(towers)


def _tower(config: Mapping[str, Any], heads: int = 0, window: int = 0) -> TowerSizes:
    inner = config.get("mlp_dim") or config.get("intermediate_size")
    return TowerSizes(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        width=config["hidden_size"],
        inner=inner or int(config["hidden_size"] * config.get("mlp_ratio", 4.0)),
        heads=heads,
        window=window,
    )


def _attention(text: TextSizes) -> Shapes:
    hidden, heads = text.hidden_size, text.num_attention_heads
    output = {"o_proj": (hidden, text.value_width)}
    queries: Shapes = {"q_proj": (text.query_width, hidden)}
    if not text.use_mla:
        keys = (text.num_key_value_heads * text.head_dim, hidden)
        return {**queries, "k_proj": keys, "v_proj": keys, **output}
    if text.q_lora_rank:
        queries = {
            "q_a_proj": (text.q_lora_rank, hidden),
            "q_b_proj": (text.query_width, text.q_lora_rank),
        }
    keys_and_values = heads * (text.qk_nope_head_dim + text.v_head_dim)
    return {
        **queries,
        "kv_a_proj_with_mqa": (text.kv_lora_rank + text.qk_rope_head_dim, hidden),
        "kv_b_proj": (keys_and_values, text.kv_lora_rank),
        **output,
    }


def _feed_forward(hidden_size: int, intermediate_size: int) -> Shapes:
    inner = (intermediate_size, hidden_size)
    return {"gate_proj": inner, "up_proj": inner, "down_proj": (hidden_size, intermediate_size)}
