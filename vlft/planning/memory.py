"""The memory that training takes, by arithmetic.

Counted are the weights, what trains with its gradients and moments, the activations that the
backward pass of one row needs, and the largest tensors that exist only within a layer's backward
pass or the loss. ``python -m benchmarks plan`` compares the sum with a measured peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from vlft.planning.sizes import language_params, language_weights, lm_head_params
from vlft.training.targets import choose_targets

if TYPE_CHECKING:
    from vlft.planning.sizes import ModelSizes, TextSizes

# Share of a GPU's memory that ``auto`` may fill; the rest is for what varies from row to row.
SAFE_SHARE = 0.92
# Shortest row that keeps a GPU busy. ``auto`` prefers gradient checkpointing to shorter rows.
ENOUGH_TOKENS = 4096

# Bytes of a parameter. nf4: 4 bits, 8 bits of scale per 64 values, and 32 bits of second scale
# per 256 first ones.
_QUANTIZED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
# A trained parameter in float32: value, gradient, and two AdamW moments.
_TRAINED_BYTES = 16
# Positions whose logits exist at once, training.loss.CHUNK.
LOSS_POSITIONS = {"cpu": 128, "cuda": 1024}
# Bytes of a logit by those of a weight: in 16 bit it has a copy in float32.
_LOGIT_BYTES = {2: 6, 4: 4}
# The CUDA context and the libraries' workspaces.
_CUDA_BYTES = 0.7 * 2**30
# Pixels of a batch of images, see vision.batches.
PIXELS_AT_ONCE = 1024**2


@dataclass(frozen=True)
class Encoding:
    """The images that are encoded before step one.

    Attributes:
        views: (number, side in pixels) of the views of the largest batch.
        decoded: batches that are decoded at once, the next ones included.
    """

    views: tuple[tuple[int, int], ...]
    decoded: int


@dataclass(frozen=True)
class MemorySpec:
    """The settings that memory depends on, every ``auto`` resolved.

    Attributes:
        weight_bytes: bytes of a frozen parameter that is not quantised.
        full: whether the LLM itself trains, instead of LoRA.
        targets: as for ``--lora-target-modules``.
        tokens: length of the row.
        cached: whether image features are cached, so that the towers leave the GPU before step one.
        encoding: the images; None stands for full batches of the size that the towers are made for.
    """

    weight_bytes: int
    quantize: str
    full: bool
    targets: str
    rank: int
    checkpointing: bool
    tokens: int
    cached: bool
    cuda: bool
    encoding: Encoding | None = None

    @property
    def all_layers(self) -> bool:
        """Whether every linear layer of the LLM trains, or has LoRA."""
        return self.full or self.targets == "ALL"


@dataclass(frozen=True)
class Memory:
    """Peak memory of a run by parts, in bytes; planning.report says what each part is.

    Attributes:
        weights: of the LLM and its lm_head, and of the other parts unless they leave the GPU.
        transient: logits, or the gradients of one layer with, if quantised, its largest weight
            dequantised; the larger of the two.
        encoding: peak of the whole process while images are encoded, before step one.
    """

    weights: float
    trained: float
    activations: float
    features: float
    transient: float
    runtime: float
    encoding: float

    @property
    def step(self) -> float:
        """Peak of a training step."""
        held = self.weights + self.trained + self.runtime
        return held + self.activations + self.features + self.transient

    @property
    def peak(self) -> float:
        """Peak of the whole run."""
        return max(self.step, self.encoding)


def estimate_memory(model: ModelSizes, spec: MemorySpec) -> Memory:
    """The memory of a run of this model with these settings."""
    text = model.text
    language = _frozen_language_bytes(text, spec)
    others = spec.weight_bytes * model.other_params
    trained = _TRAINED_BYTES * trained_params(model, spec)
    runtime = _CUDA_BYTES if spec.cuda else 0.0
    return Memory(
        weights=language + (0.0 if spec.cached and spec.cuda else others),
        trained=trained,
        activations=_activation_bytes(text, spec),
        features=3.0 * spec.weight_bytes * spec.tokens * text.hidden_size,
        transient=_transient_bytes(text, spec),
        runtime=runtime,
        # Of what trains only the values are there: gradients and moments come with step one.
        encoding=language + others + trained / 4 + runtime + _image_bytes(model, spec),
    )


def _image_bytes(model: ModelSizes, spec: MemorySpec) -> float:
    """What a batch of images holds at most on its way through the towers.

    On the CPU that is also the batches that are decoded, in float32, and the inputs of the towers.
    """
    encoding = spec.encoding or _full_batches(model)
    most = max(
        tower.numbers(number, side)
        for tower in model.towers
        for number, side in encoding.views
        # With two towers, an image has a view for each.
        if len(model.towers) == 1 or side == tower.image_size
    )
    pixels = sum(3 * number * side**2 for number, side in encoding.views)
    decoded = 0 if spec.cuda else 4 * encoding.decoded * pixels
    return spec.weight_bytes * (most + pixels) + decoded


def _full_batches(model: ModelSizes) -> Encoding:
    """Batches of images of the size that the towers are made for."""
    number = max(1, PIXELS_AT_ONCE // max(tower.image_size for tower in model.towers) ** 2)
    return Encoding(tuple((number, tower.image_size) for tower in model.towers), 1)


def trained_params(model: ModelSizes, spec: MemorySpec) -> int:
    """Number of parameters that train: the LLM's, or those of LoRA."""
    text = model.text
    if spec.full:
        return language_params(text) + lm_head_params(text)
    shapes = language_weights(text, "language")
    linears = [name for name, shape in shapes.items() if len(shape) == 2]
    experts = [name for name, shape in shapes.items() if len(shape) == 3]
    chosen = choose_targets(spec.targets, model.attention_inputs, linears, experts)
    return sum(
        spec.rank * sum(shapes[name][-2:]) * prod(shapes[name][:-2])
        for name in (*chosen.modules, *chosen.parameters)
    )


def _frozen_language_bytes(text: TextSizes, spec: MemorySpec) -> float:
    """Frozen weights of the LLM and its lm_head; int8 leaves experts unquantised."""
    if spec.full:
        return 0.0
    total = language_params(text) + lm_head_params(text)
    shapes = language_weights(text, "").values()
    quantized = sum(prod(s) for s in shapes if spec.quantize == "nf4" or len(s) == 2)
    each = _QUANTIZED_BYTES.get(spec.quantize, spec.weight_bytes)
    return spec.weight_bytes * (total - quantized) + each * quantized


def _activation_bytes(text: TextSizes, spec: MemorySpec) -> float:
    """What the backward pass of a row needs.

    With gradient checkpointing this is the input of each layer, and all of the layer whose
    backward pass is running.
    """
    if spec.checkpointing:
        inputs = text.num_hidden_layers * spec.tokens * text.hidden_size * spec.weight_bytes
        return inputs + max(_layer_bytes(text, spec))
    return sum(_layer_bytes(text, spec))


def _layer_bytes(text: TextSizes, spec: MemorySpec) -> list[float]:
    """What the backward pass needs of each layer."""
    attention = _attention_bytes(text, spec)
    others = range(text.num_hidden_layers - 1)
    layers = [attention + _feed_forward_bytes(text, layer, spec) for layer in others]
    return [*layers, _last_layer_bytes(text, spec)]


def _attention_bytes(text: TextSizes, spec: MemorySpec) -> float:
    """What the backward pass needs of a layer's attention and of both norms.

    The norms keep their inputs in float32, LoRA on the attention's inputs the normalised state,
    attention its queries, keys and values, and fused kernels their output. LoRA on all layers keeps
    the input of the output projection as well.
    """
    width, hidden = spec.weight_bytes, text.hidden_size
    norms = 2 * 4 * hidden
    outputs = spec.cuda + spec.all_layers
    attention = width * (2 * text.query_width + (1 + outputs) * text.value_width)
    return float(spec.tokens * (norms + width * hidden + attention))


def _last_layer_bytes(text: TextSizes, spec: MemorySpec) -> float:
    """What the backward pass needs of the last layer, see models.last_layer.

    Only its first norm, keys and values are of all tokens; the rest runs at the few positions that
    have a target.
    """
    width = spec.weight_bytes * (text.hidden_size + text.query_width + text.value_width)
    return float(spec.tokens * (4 * text.hidden_size + width))


def _feed_forward_bytes(text: TextSizes, layer: int, spec: MemorySpec) -> float:
    """What the backward pass needs of a layer's feed-forward part.

    A gated layer keeps gate and up, routed experts likewise. LoRA on all layers keeps the inputs of
    its matrices as well.
    """
    tensors = 3 if spec.all_layers else 2
    per_token = text.hidden_size if spec.all_layers else 0
    if text.has_experts(layer):
        width = text.moe_intermediate_size
        routed = 2 * width + (width + text.hidden_size) * spec.all_layers
        per_token += text.num_experts_per_tok * routed + tensors * width * text.n_shared_experts
    else:
        per_token += tensors * text.intermediate_size
    return float(spec.weight_bytes * spec.tokens * per_token)


def _transient_bytes(text: TextSizes, spec: MemorySpec) -> float:
    """See Memory.transient."""
    routed = text.num_experts_per_tok * (text.moe_intermediate_size + text.hidden_size)
    widest = max(text.intermediate_size, routed)
    gradients = spec.weight_bytes * spec.tokens * (2 * widest + 2 * text.hidden_size)
    largest = max(prod(shape) for shape in language_weights(text, "").values())
    dequantized = spec.weight_bytes * largest if spec.quantize != "none" else 0.0
    positions = LOSS_POSITIONS["cuda" if spec.cuda else "cpu"]
    logits = positions * _LOGIT_BYTES[spec.weight_bytes] * text.vocab_size
    # With gradient checkpointing no layer is recomputed before the loss is done.
    before_layers = max(_layer_bytes(text, spec)) if spec.checkpointing else 0.0
    return max(logits - before_layers, gradients + dequantized)
