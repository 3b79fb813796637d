"""The memory that tuning takes, by arithmetic: what is held, and what a row adds.

Counted are weights, what trains with its gradient and moments, what the backward pass keeps of a
row, and the largest of what exists only for a moment. ``python -m benchmarks plan`` compares the
sum with a measured peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from vlft.config import TOKENS_PER_ROW, SftConfig
from vlft.planning.sizes import TextSizes, language_params, language_weights, lm_head_params
from vlft.training.targets import choose_targets

if TYPE_CHECKING:
    from collections.abc import Collection

# nf4: half a byte, a byte of scale per 64, four bytes of second scale per 64 * 256.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
INT8_BYTES = 1.0
# A trained number in float32: value, gradient, two moments.
TRAINED_BYTES = 16
# Of a GPU's memory that ``auto`` takes; the rest is for what varies from row to row.
SAFE_SHARE = 0.92
# Tokens of a row that keep a GPU busy: shorter rows are not taken to spare checkpointing.
ENOUGH_TOKENS = 4096
# Positions whose logits exist at once, and what one of them is with its gradients; training.loss.
LOSS_POSITIONS, LOSS_BYTES = 128, 12
# What CUDA and its libraries hold.
CUDA_BYTES = 0.7 * 2**30
# How many tensors of the attention scores of a head of the SAM tower exist together.
SCORES = 2.5
# What a batch of small views takes in a SigLIP tower, about.
VIEWS_BYTES = 2**27


@dataclass(frozen=True)
class MemorySpec:
    """What the memory depends on; see the flags of the same names.

    Attributes:
        width: bytes of a plain weight.
        quantize: none, nf4 or int8.
        full: whether the LLM itself trains.
        targets: of LoRA.
        rank: of LoRA.
        checkpointing: whether activations are recomputed.
        tokens: of a row.
        scores: of a head of the SAM tower's attention; 0 without one.
        cached: whether the towers leave the GPU before step one.
        cuda: whether it runs on one.
    """

    width: int = 2
    quantize: str = SftConfig.quantize
    full: bool = False
    targets: str = SftConfig.lora_target_modules
    rank: int = SftConfig.lora_rank
    checkpointing: bool = True
    tokens: int = TOKENS_PER_ROW["cuda"]
    scores: int = 0
    cached: bool = True
    cuda: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step.

    Attributes:
        weights: of the LLM, its head, and the other parts that stay.
        trained: values, gradients and moments of what trains.
        activations: what the backward pass keeps of a row.
        features: of a row's images, and its embeddings.
        moment: the largest of what exists only for a moment: logits, one layer's gradients, and
            with 4 or 8 bit the largest weight unpacked.
        runtime: of CUDA and its libraries.
        encoding: at the peak of encoding images, which comes before step one.
    """

    weights: float
    trained: float
    activations: float
    features: float
    moment: float
    runtime: float
    encoding: float

    @property
    def step(self) -> float:
        """At the peak of a step."""
        held = self.weights + self.trained + self.runtime
        return held + self.activations + self.features + self.moment

    @property
    def peak(self) -> float:
        """Of the whole run."""
        return max(self.step, self.encoding)


def memory(
    text: TextSizes, others: int, attention_inputs: Collection[str], asked: MemorySpec
) -> Memory:
    """What a run takes.

    Args:
        text: sizes of the LLM.
        others: numbers in towers, aligner and other parts.
        attention_inputs: ends of the names that ``qkv`` means.
        asked: see MemorySpec.
    """
    held = _language_bytes(text, asked)
    towers = asked.width * others
    trained = TRAINED_BYTES * trained_size(text, attention_inputs, asked)
    runtime = CUDA_BYTES if asked.cuda else 0.0
    leaves = asked.cached and asked.cuda
    largest = max(prod(shape) for shape in language_weights(text, "").values())
    unpacked = asked.width * largest if asked.quantize != "none" else 0.0
    attention = _attention_bytes(text, asked)
    # The last layer's feed-forward part sees the few positions that have a target.
    layers = [attention + _inner_bytes(text, layer, asked) for layer in range(text.layers - 1)]
    kept = sum(layers) + attention
    if asked.checkpointing:
        kept = text.layers * asked.tokens * text.hidden * asked.width + max([attention, *layers])
    gradients = asked.width * asked.tokens * (2 * _inner(text) + 2 * text.hidden)
    logits = LOSS_POSITIONS * LOSS_BYTES * text.vocabulary
    return Memory(
        weights=held + (0.0 if leaves else towers),
        trained=trained,
        activations=kept,
        features=3.0 * asked.width * asked.tokens * text.hidden,
        moment=max(logits, gradients + unpacked),
        runtime=runtime,
        encoding=held + towers + trained / 4 + runtime + _encoding_bytes(asked),
    )


def trained_size(text: TextSizes, attention_inputs: Collection[str], asked: MemorySpec) -> int:
    """How many numbers train."""
    if asked.full:
        return language_params(text) + lm_head_params(text)
    shapes = language_weights(text, "language")
    linears = [name for name, shape in shapes.items() if len(shape) == 2]
    experts = [name for name, shape in shapes.items() if len(shape) == 3]
    chosen = choose_targets(asked.targets, attention_inputs, linears, experts)
    return sum(
        asked.rank * sum(shapes[name][-2:]) * prod(shapes[name][:-2])
        for name in (*chosen.modules, *chosen.parameters)
    )


def _encoding_bytes(asked: MemorySpec) -> float:
    """Of images on their way through the towers."""
    return max(SCORES * asked.width * asked.scores, VIEWS_BYTES)


def _language_bytes(text: TextSizes, asked: MemorySpec) -> float:
    """Of the LLM's frozen weights; trained ones are counted apart."""
    if asked.full:
        return 0.0
    total = language_params(text) + lm_head_params(text)
    shapes = language_weights(text, "").values()
    # 8 bit is for plain linear layers.
    packed = sum(prod(s) for s in shapes if asked.quantize == "nf4" or len(s) == 2)
    each = {"nf4": NF4_BYTES, "int8": INT8_BYTES}.get(asked.quantize, asked.width)
    return asked.width * (total - packed) + each * packed


def _attention_bytes(text: TextSizes, asked: MemorySpec) -> float:
    """What the backward pass keeps of a layer's attention, and of both norms.

    The norms keep their inputs, in float32; LoRA on the attention's inputs keeps the normalised
    state; attention keeps queries, keys, values and its result. LoRA on all layers keeps the input
    of the output projection as well.
    """
    width, hidden = asked.width, text.hidden
    norms = 2 * 4 * hidden
    # In 16 bit, LoRA's float32 weights make a copy of their input for each of q, k, v.
    inputs = width * hidden * (1 if width == 4 else 3)
    attention = width * (2 * text.query + 2 * text.value)
    if _tunes_all(asked):
        attention += width * text.value
    return float(asked.tokens * (norms + inputs + attention))


def _inner_bytes(text: TextSizes, layer: int, asked: MemorySpec) -> float:
    """What the backward pass keeps of a layer's feed-forward part.

    A gated layer keeps three of its inner width, routed experts what gate and up give. LoRA on all
    layers keeps their inputs as well.
    """
    every = _tunes_all(asked)
    share = 4 if every else 3
    if text.experts is not None and text.is_sparse(layer):
        experts = text.experts
        routed = experts.best * (2 * experts.width + (experts.width + text.hidden) * every)
        numbers = routed + share * experts.width * experts.shared
    else:
        numbers = share * text.inner
    return float(asked.width * asked.tokens * (numbers + text.hidden * every))


def _tunes_all(asked: MemorySpec) -> bool:
    return asked.full or asked.targets == "ALL"


def _inner(text: TextSizes) -> int:
    """The widest that a layer becomes, per token."""
    if text.experts is None:
        return text.inner
    experts = text.experts
    return max(text.inner, experts.best * (experts.width + text.hidden))
