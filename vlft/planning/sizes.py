"""Layer shapes and parameter counts of a model, by arithmetic on its config: no module is built.

Names and shapes are those of the model's class, so that what is chosen by name (LoRA targets,
quantised weights) can be counted before there is a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ExpertSizes:
    """Sizes of the mixture-of-experts layers.

    Attributes:
        routed: number of routed experts.
        top_k: routed experts that each token goes through.
        shared: experts that every token goes through.
        intermediate_size: of one expert.
        dense_layers: how many of the first layers have a plain feed-forward part instead.
        router_bias: whether a learned bias is added to the scores that select experts.
    """

    routed: int
    top_k: int
    shared: int
    intermediate_size: int
    dense_layers: int
    router_bias: bool


@dataclass(frozen=True)
class LatentSizes:
    """Sizes of multi-head latent attention (MLA).

    Attributes:
        kv_lora_rank: width of the compressed keys and values.
        q_lora_rank: width of the compressed queries; 0 if queries are not compressed.
        qk_nope_head_dim: width of a head's query and key without rotary embedding.
        qk_rope_head_dim: width of the part with rotary embedding.
        v_head_dim: width of a head's value.
    """

    kv_lora_rank: int
    q_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class TextSizes:
    """Sizes of a language model.

    Attributes:
        vocab_size: tokens in the vocabulary.
        hidden_size: width of the residual stream.
        intermediate_size: of the plain feed-forward layers.
        layers: number of layers.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head; ``latent`` has its own.
        tied: whether the vocabulary projection is the embedding.
        experts: of a mixture of experts, else None.
        latent: of latent attention, else None.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False
    experts: ExpertSizes | None = None
    latent: LatentSizes | None = None

    @property
    def query_width(self) -> int:
        """Width of the queries of all heads."""
        if self.latent is None:
            return self.heads * self.head_dim
        return self.heads * (self.latent.qk_nope_head_dim + self.latent.qk_rope_head_dim)

    @property
    def value_width(self) -> int:
        """Width of the values of all query heads, which is that of attention's output."""
        return self.heads * (self.head_dim if self.latent is None else self.latent.v_head_dim)

    def experts_of(self, layer: int) -> ExpertSizes | None:
        """The experts of a layer; None if its feed-forward part is plain."""
        has_some = self.experts is not None and layer >= self.experts.dense_layers
        return self.experts if has_some else None


@dataclass(frozen=True)
class ModelSizes:
    """What the memory of a model depends on.

    Attributes:
        text: sizes of the LLM.
        other_params: parameters of all other parts: towers, aligner, image generation.
        sam_scores: see ``sam_attention_scores``.
        attention_inputs: leaf names that ``--lora-target-modules qkv`` means.
    """

    text: TextSizes
    other_params: int
    sam_scores: int
    attention_inputs: tuple[str, ...]


def model_sizes(
    native: Mapping[str, Any], params: int, attention_inputs: tuple[str, ...]
) -> ModelSizes:
    """The sizes of a model.

    Args:
        native: keyword arguments of its config, as ``Family.native_config`` makes them.
        params: of the whole model; 0 if unknown.
        attention_inputs: see ModelSizes.
    """
    text = text_sizes(native["text_config"])
    others = max(0, params - language_params(text) - lm_head_params(text))
    return ModelSizes(text, others, sam_attention_scores(native), attention_inputs)


def text_sizes(text: Mapping[str, Any]) -> TextSizes:
    """The sizes in the keyword arguments of a text config."""
    hidden_size, heads = text["hidden_size"], text["num_attention_heads"]
    experts = latent = None
    if text.get("n_routed_experts"):
        experts = ExpertSizes(
            routed=text["n_routed_experts"],
            top_k=text["num_experts_per_tok"],
            shared=text["n_shared_experts"] or 0,
            intermediate_size=text["moe_intermediate_size"],
            dense_layers=text["first_k_dense_replace"],
            router_bias=text["topk_method"] == "noaux_tc",
        )
    if text.get("use_mla"):
        latent = LatentSizes(
            kv_lora_rank=text["kv_lora_rank"],
            q_lora_rank=text["q_lora_rank"] or 0,
            qk_nope_head_dim=text["qk_nope_head_dim"],
            qk_rope_head_dim=text["qk_rope_head_dim"],
            v_head_dim=text["v_head_dim"],
        )
    return TextSizes(
        vocab_size=text["vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or hidden_size // heads,
        tied=bool(text.get("tie_word_embeddings")),
        experts=experts,
        latent=latent,
    )


def language_weights(text: TextSizes, prefix: str) -> Shapes:
    """Every linear layer of the LLM, (out, in), and its experts, (E, out, in), by name."""
    hidden = text.hidden_size
    shapes: Shapes = {}
    for layer in range(text.layers):
        name = f"{prefix}.layers.{layer}"
        parts = {"self_attn": _attention(text)}
        if experts := text.experts_of(layer):
            width = experts.intermediate_size
            shapes[f"{name}.mlp.experts.gate_up_proj"] = (experts.routed, 2 * width, hidden)
            shapes[f"{name}.mlp.experts.down_proj"] = (experts.routed, hidden, width)
            parts["mlp.shared_experts"] = _feed_forward(hidden, width * experts.shared)
        else:
            parts["mlp"] = _feed_forward(hidden, text.intermediate_size)
        for part, linears in parts.items():
            shapes |= {f"{name}.{part}.{leaf}": shape for leaf, shape in linears.items()}
    return shapes


def language_params(text: TextSizes) -> int:
    """Parameters of the LLM: linear layers, experts, routers, norms and embedding; no lm_head."""
    norms = 2 * text.hidden_size
    if text.latent is not None:
        norms += text.latent.kv_lora_rank + text.latent.q_lora_rank
    routers = 0
    for experts in filter(None, map(text.experts_of, range(text.layers))):
        routers += experts.routed * (text.hidden_size + experts.router_bias)
    embedding_and_last_norm = text.vocab_size * text.hidden_size + text.hidden_size
    weights = sum(prod(shape) for shape in language_weights(text, "").values())
    return weights + text.layers * norms + routers + embedding_and_last_norm


def lm_head_params(text: TextSizes) -> int:
    """Parameters of the vocabulary projection; 0 if it is the embedding."""
    return 0 if text.tied else text.vocab_size * text.hidden_size


def sam_attention_scores(native: Mapping[str, Any]) -> int:
    """Elements of one head's attention scores in the SAM tower; 0 without such a tower.

    SAM adds relative positions to its scores, so that they exist as a tensor, one head after the
    other (see models.sam_attention). SigLIP's attention is fused and stores none.
    """
    tower = native.get("high_res_vision_config")
    if tower is None:
        return 0
    patches = (tower["image_size"] // tower["patch_size"]) ** 2
    return int(patches * patches)


def _attention(text: TextSizes) -> Shapes:
    hidden, latent = text.hidden_size, text.latent
    if latent is None:
        keys = text.kv_heads * text.head_dim
        return {
            "q_proj": (text.query_width, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, text.value_width),
        }
    queries: Shapes = {"q_proj": (text.query_width, hidden)}
    if latent.q_lora_rank:
        queries = {
            "q_a_proj": (latent.q_lora_rank, hidden),
            "q_b_proj": (text.query_width, latent.q_lora_rank),
        }
    keys_and_values = text.heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    return {
        **queries,
        "kv_a_proj_with_mqa": (latent.kv_lora_rank + latent.qk_rope_head_dim, hidden),
        "kv_b_proj": (keys_and_values, latent.kv_lora_rank),
        "o_proj": (hidden, text.value_width),
    }


def _feed_forward(hidden_size: int, intermediate_size: int) -> Shapes:
    return {
        "gate_proj": (intermediate_size, hidden_size),
        "up_proj": (intermediate_size, hidden_size),
        "down_proj": (hidden_size, intermediate_size),
    }
