"""The values of weights in 4 bit, bitsandbytes' blocks of numbers with a scale each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def dequantized(weight: Any) -> Tensor:
    """(E, out, in), or (out, in): the values of a 4 bit parameter."""
    import bitsandbytes as bnb

    value: Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return value


def dequantized_parts(weight: Any, chosen: Tensor) -> Tensor:
    """(S, out, in): the values of chosen experts, (S,) int64, of a 4 bit parameter (E, out, in).

    The same bits as those of ``dequantized``.
    """
    import bitsandbytes as bnb

    state, functional = weight.quant_state, bnb.functional
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    count, *shape = state.shape
    parts: Tensor = functional.dequantize_4bit(
        weight.data.view(count, -1)[chosen].view(-1, 1),
        functional.QuantState(
            absmax=scales.float().view(count, -1)[chosen].flatten(),
            shape=torch.Size((len(chosen), *shape)), code=state.code, blocksize=state.blocksize,
            quant_type=state.quant_type, dtype=state.dtype,
        ),
    )  # fmt: skip
    return parts
