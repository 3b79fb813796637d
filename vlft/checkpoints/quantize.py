"""4 and 8 bit storage of the LLM's linear layers, through bitsandbytes.

nf4 follows QLoRA (https://arxiv.org/abs/2305.14314): NormalFloat4 blocks of 64 with double
quantisation of their scales, products computed in the model's dtype.
"""

from __future__ import annotations

import functools
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
    prefix = family.parts.language
    if quantize == "int8" and any(isinstance(m, PLAIN_EXPERTS) for m in model.modules()):
        console.warn("int8 leaves the experts in 16 bit; --quantize nf4 covers them too")
    for name, module in list(model.get_submodule(prefix).named_modules(prefix=prefix)):
        if type(module) is nn.Linear:
            _replace(model, name, _quantized_like(module, quantize, dtype))
        elif isinstance(module, PLAIN_EXPERTS) and quantize == "nf4":
            _replace(model, name, Experts4bit(module, dtype))


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

    tensor = tensor.to("cpu", copy=True)
    if isinstance(module, bnb.nn.Linear4bit | Experts4bit):
        layer = module if isinstance(module, bnb.nn.Linear4bit) else None
        weight = bnb.nn.Params4bit(
            tensor, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
        )
    else:
        weight = bnb.nn.Int8Params(tensor, requires_grad=False, has_fp16_weights=False)
    quantized: nn.Parameter = weight.to(device)
    return quantized


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


def dequantize_linears(model: nn.Module) -> None:
    """Replaces each quantised layer by a float32 one with the weights that it computed with."""
    for name, module in list(model.named_modules()):
        if is_quantized(module):
            _replace(model, name, _plain_linear(module))
        elif isinstance(module, Experts4bit):
            _replace(model, name, _plain_experts(module))
    mark_quantized(model, "none")


def _plain_linear(module: Any) -> nn.Linear:
    import bitsandbytes as bnb

    if isinstance(module, bnb.nn.Linear4bit):
        weight = dequantized(module.weight).float()
    else:
        # The scale of a row is its largest magnitude, which int8 stores as 127.
        held, state = module.weight, module.state
        scales: Tensor = held.SCB if held.SCB is not None else state.SCB
        codes: Tensor = held.CB if held.CB is not None else state.CB
        weight = codes.float() * scales.float().unsqueeze(1) / 127.0
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=module.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.data.float(), requires_grad=False)
    return linear


def _plain_experts(module: Experts4bit) -> nn.Module:
    with torch.device("meta"):
        experts: nn.Module = module.plain_class(module.config)
    for name in PROJECTIONS:
        weight = dequantized(getattr(module, name)).float()
        setattr(experts, name, nn.Parameter(weight, requires_grad=False))
    return experts


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
