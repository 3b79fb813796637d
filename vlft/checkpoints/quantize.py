"""4 and 8 bit storage of the LLM's linear layers, through bitsandbytes.

nf4 follows QLoRA (https://arxiv.org/abs/2305.14314): NormalFloat4 blocks of 64 with double
quantisation of their scales, products computed in the model's dtype.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlft import console
from vlft.models.experts import PLAIN_EXPERTS, PROJECTIONS, Experts4bit
from vlft.models.four_bit import dequantized

if TYPE_CHECKING:
    from vlft.families.base import Family

# Features with a larger magnitude are computed in 16 bit (LLM.int8(), https://arxiv.org/abs/2208.07339,
# section 3.2). transformers' default; bitsandbytes' own is 0, which rounds them like all others.
OUTLIER_THRESHOLD = 6.0


def quantize_language(model: nn.Module, family: Family, quantize: str, dtype: torch.dtype) -> None:
    """Replaces the LLM's linear layers, for nf4 its experts too, by empty quantised ones."""
    if quantize == "none":
        return
    if quantize == "int8" and any(isinstance(m, PLAIN_EXPERTS) for m in model.modules()):
        console.warn("int8 leaves the experts in 16 bit; --quantize nf4 covers them too")
    for name, module in _quantizable(model, family, quantize):
        experts = isinstance(module, PLAIN_EXPERTS)
        _replace(
            model,
            name,
            Experts4bit(module, dtype) if experts else _quantized_like(module, quantize, dtype),
        )


def _quantizable(model: nn.Module, family: Family, quantize: str) -> list[tuple[str, Any]]:
    """Name and module of what a run with these settings holds quantised."""
    prefix = family.parts.language
    return [
        (name, module)
        for name, module in model.get_submodule(prefix).named_modules(prefix=prefix)
        if type(module) is nn.Linear or (isinstance(module, PLAIN_EXPERTS) and quantize == "nf4")
    ]


def is_quantized(module: nn.Module) -> bool:
    """Whether the module holds a 4 or 8 bit weight."""
    return any(kind.__name__ in ("Linear4bit", "Linear8bitLt") for kind in type(module).__mro__)


def holds_quantized(module: nn.Module, leaf: str) -> bool:
    """Whether the module's parameter ``leaf`` is a 4 or 8 bit weight."""
    if isinstance(module, Experts4bit):
        return leaf in PROJECTIONS
    return is_quantized(module) and leaf == "weight"


def quantized_weight(module: Any, tensor: Tensor, device: torch.device) -> nn.Parameter:
    """A weight for the module: ``tensor`` in 4 or 8 bit on the device."""
    import bitsandbytes as bnb

    four_bit = isinstance(module, bnb.nn.Linear4bit | Experts4bit)
    weight = _parameter(tensor.to("cpu", copy=True), "nf4" if four_bit else "int8")
    if isinstance(module, bnb.nn.Linear4bit):
        weight.module = module
    quantized: nn.Parameter = weight.to(device)
    return quantized


def _parameter(tensor: Tensor, quantize: str) -> Any:
    """A parameter on the CPU that is quantised, in place, by being moved to a device."""
    import bitsandbytes as bnb

    if quantize == "nf4":
        return bnb.nn.Params4bit(
            tensor, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
    return bnb.nn.Int8Params(tensor, requires_grad=False, has_fp16_weights=False)


@functools.cache
def int8_overflows() -> bool:
    """Whether int8 products are wrong on this CPU: without VNNI oneDNN adds two in 16 bits."""
    extreme = torch.full((32, 64), 127, dtype=torch.int8)
    exact = extreme.int() @ extreme.int().T
    return not torch.equal(torch._int_mm(extreme, extreme.T.contiguous()), exact)


def keep_scales(model: nn.Module) -> None:
    """Moves the scales of 8 bit weights from the weights into their modules."""
    for module in model.modules():
        move: Any = getattr(module, "init_8bit_state", None)
        if move is not None:
            move()


@dataclass(frozen=True)
class Rounding:
    """Weights as a quantised run computed with them, in float32.

    Each tensor is quantised and dequantised by itself, so that a quantised model is never held.

    Attributes:
        quantize: of the run, nf4 or int8.
        dtype: of the run.
        device: that quantises.
        names: of the weights that the run had quantised.
    """

    quantize: str
    dtype: torch.dtype
    device: torch.device
    names: frozenset[str]

    @staticmethod
    def of(
        model: nn.Module, family: Family, quantize: str, dtype: torch.dtype, device: torch.device
    ) -> Rounding:
        """How a run rounded this unquantised model, whose weights need not be loaded yet."""
        names = set()
        for name, module in _quantizable(model, family, quantize):
            leaves = PROJECTIONS if isinstance(module, PLAIN_EXPERTS) else ("weight",)
            names |= {f"{name}.{leaf}" for leaf in leaves}
        return Rounding(quantize, dtype, device, frozenset(names))

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor of this name, in float32."""
        tensor = tensor.to(self.dtype)
        return self._round(tensor) if name in self.names else tensor.float()

    def seconds(self, model: nn.Module) -> float:
        """How long the weights of a model take, by how long some numbers take now."""
        numbers = sum(p.numel() for name, p in model.named_parameters() if name in self.names)
        some = torch.randn(1024, 1024, dtype=self.dtype)
        self._round(some)
        started = time.perf_counter()
        float(self._round(some)[0, 0])
        return (time.perf_counter() - started) * numbers / some.numel()

    def _round(self, tensor: Tensor) -> Tensor:
        held = _parameter(tensor.to("cpu", copy=True), self.quantize).to(self.device)
        if self.quantize == "nf4":
            return dequantized(held).float()
        # The scale of a row is its largest magnitude, which int8 stores as 127.
        codes: Tensor = held.data.float()
        scales: Tensor = held.SCB.float().unsqueeze(1)
        return codes * scales / 127.0


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def finish_quantized(model: Any, quantize: str, device: torch.device) -> None:
    """Makes a model whose quantised weights are in place ready to run."""
    mark_quantized(model, quantize)
    keep_scales(model)
    if (quantize, device.type) == ("int8", "cpu") and int8_overflows():
        console.warn("int8 products overflow on this CPU (no VNNI); use --quantize nf4 or none")


def mark_quantized(model: Any, quantize: str) -> None:
    """Sets the attributes by which peft and Accelerate recognise a quantised model."""
    model.is_loaded_in_4bit = quantize == "nf4"
    model.is_loaded_in_8bit = quantize == "int8"


def _quantized_like(linear: nn.Linear, quantize: str, dtype: torch.dtype) -> Any:
    import bitsandbytes as bnb

    size = (linear.in_features, linear.out_features, linear.bias is not None)
    if quantize == "nf4":
        layer = bnb.nn.Linear4bit(
            *size, compute_dtype=dtype, quant_type="nf4", compress_statistics=True, device="meta"
        )
        # Otherwise evaluation on CPUs with AVX512-BF16 repacks the weight in place: products are
        # bfloat16 whatever the dtype, and widths that are no multiple of the block size crash.
        layer.support_avx512bf16_for_cpu = False
    else:
        layer = _flat_linear_8bit()(
            *size, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta"
        )
    return layer


@functools.cache
def _flat_linear_8bit() -> Any:
    import bitsandbytes as bnb

    class FlatLinear8bit(bnb.nn.Linear8bitLt):  # type: ignore[misc]
        """Takes inputs of four axes, and keeps its scales when its weight is moved.

        bitsandbytes 0.50 fails with four axes in evaluation mode. ``weight.to("cpu")``, as in
        peft's start of DoRA, gives a weight without scales, which it would take over.
        """

        def init_8bit_state(self) -> None:
            if self.weight.SCB is not None:
                super().init_8bit_state()
            self.state.CB, self.weight.CB = self.weight.data, None

        def forward(self, x: Tensor) -> Tensor:
            flat: Tensor = super().forward(x.flatten(0, -2))
            return flat.view(*x.shape[:-1], -1)

    return FlatLinear8bit
