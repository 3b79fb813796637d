"""How large a language model is, by arithmetic on its config: no module is built.

The names and shapes are those of the model's class, so that what is chosen by name (LoRA, 4 bit)
can be counted before there is a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Experts:
    """The feed-forward layers of a mixture of experts.

    Attributes:
        routed: experts to choose from.
        best: how many of them each token takes.
        shared: experts that every token takes.
        width: inner width of an expert.
        dense: first layers that have none.
        corrected: whether the router has a selection bias.
    """

    routed: int
    best: int
    shared: int
    width: int
    dense: int
    corrected: bool


@dataclass(frozen=True)
class Latent:
    """Attention over compressed keys and values.

    Attributes:
        rank: of keys and values.
        query_rank: of queries; 0 if they are not compressed.
        plain: width of a head's query without rotation.
        rotary: width of the part with rotation.
        value: width of a head's value.
    """

    rank: int
    query_rank: int
    plain: int
    rotary: int
    value: int


@dataclass(frozen=True)
class TextSizes:
    """Sizes of a language model.

    Attributes:
        vocabulary: tokens.
        hidden: width.
        inner: width of the dense feed-forward layers.
        layers: how many.
        heads: of the queries.
        key_heads: of keys and values.
        head: width of a head.
        tied: whether embedding and head are one weight.
        experts: if it has some.
        latent: if attention is latent.
    """

    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head: int
    tied: bool = False
    experts: Experts | None = None
    latent: Latent | None = None

    @property
    def query(self) -> int:
        """Width of all queries."""
        return self.heads * (self.latent.plain + self.latent.rotary if self.latent else self.head)

    @property
    def value(self) -> int:
        """Width of all values, as attention sees them."""
        return self.heads * (self.latent.value if self.latent else self.head)

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer has experts."""
        return self.experts is not None and layer >= self.experts.dense


def text_sizes(text: Mapping[str, Any]) -> TextSizes:
    """The sizes in keyword arguments of a text config, as ``Family.native_config`` makes them."""
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    experts = latent = None
    if text.get("n_routed_experts"):
        experts = Experts(
            routed=text["n_routed_experts"],
            best=text["num_experts_per_tok"],
            shared=text["n_shared_experts"] or 0,
            width=text["moe_intermediate_size"],
            dense=text["first_k_dense_replace"],
            corrected=text["topk_method"] == "noaux_tc",
        )
    if text.get("use_mla"):
        latent = Latent(
            rank=text["kv_lora_rank"],
            query_rank=text["q_lora_rank"] or 0,
            plain=text["qk_nope_head_dim"],
            rotary=text["qk_rope_head_dim"],
            value=text["v_head_dim"],
        )
    return TextSizes(
        vocabulary=text["vocab_size"],
        hidden=hidden,
        inner=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        key_heads=text.get("num_key_value_heads") or heads,
        head=text.get("head_dim") or hidden // heads,
        tied=bool(text.get("tie_word_embeddings")),
        experts=experts,
        latent=latent,
    )


def language_weights(text: TextSizes, prefix: str) -> Shapes:
    """Every linear layer of the LLM, (out, in), and its experts, (E, out, in), by name."""
    shapes: Shapes = {}
    for layer in range(text.layers):
        name = f"{prefix}.layers.{layer}"
        parts = {"self_attn": _attention(text)}
        if text.experts is not None and text.is_sparse(layer):
            width, routed = text.experts.width, text.experts.routed
            shapes[f"{name}.mlp.experts.gate_up_proj"] = (routed, 2 * width, text.hidden)
            shapes[f"{name}.mlp.experts.down_proj"] = (routed, text.hidden, width)
            parts["mlp.shared_experts"] = _gated(text.hidden, width * text.experts.shared)
        else:
            parts["mlp"] = _gated(text.hidden, text.inner)
        for part, linears in parts.items():
            shapes |= {f"{name}.{part}.{leaf}": shape for leaf, shape in linears.items()}
    return shapes


def language_params(text: TextSizes) -> int:
    """Numbers in the LLM: linear layers, experts, routers, norms and embedding, not the head."""
    norms = 2 * text.hidden
    if text.latent is not None:
        norms += text.latent.rank + text.latent.query_rank
    routers = 0
    if text.experts is not None:
        sparse = sum(text.is_sparse(layer) for layer in range(text.layers))
        routers = sparse * text.experts.routed * (text.hidden + text.experts.corrected)
    ends = text.vocabulary * text.hidden + text.hidden
    weights = sum(prod(shape) for shape in language_weights(text, "").values())
    return weights + text.layers * norms + routers + ends


def tower_scores(native: Mapping[str, Any]) -> int:
    """Numbers in the attention scores of a head of the SAM tower; 0 if there is none.

    SigLIP's attention is fused and makes none; SAM adds relative positions to its scores, and
    takes one head after the other.
    """
    tower = native.get("high_res_vision_config")
    if tower is None:
        return 0
    patches = (tower["image_size"] // tower["patch_size"]) ** 2
    return int(patches * patches)


def lm_head_params(text: TextSizes) -> int:
    """Numbers in the vocabulary projection, unless it is the embedding."""
    return 0 if text.tied else text.vocabulary * text.hidden


def _attention(text: TextSizes) -> Shapes:
    hidden = text.hidden
    if text.latent is None:
        keys = text.key_heads * text.head
        return {
            "q_proj": (text.query, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, text.value),
        }
    latent = text.latent
    queries: Shapes = {"q_proj": (text.query, hidden)}
    if latent.query_rank:
        queries = {
            "q_a_proj": (latent.query_rank, hidden),
            "q_b_proj": (text.query, latent.query_rank),
        }
    return {
        **queries,
        "kv_a_proj_with_mqa": (latent.rank + latent.rotary, hidden),
        "kv_b_proj": (text.heads * (latent.plain + latent.value), latent.rank),
        "o_proj": (hidden, text.value),
    }


def _gated(hidden: int, inner: int) -> Shapes:
    return {
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
