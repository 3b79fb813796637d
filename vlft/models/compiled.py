"""The LLM's layers compiled by torch: norms, rotations, activations and LoRA's sums are fused.

    layer(hidden) ── checkpointing, if it is on ── compiled: norm, q k v ┊ attention ┊ o, norm, MLP

Attention over a packed row and experts, whose shapes of work change with every row, are left out:
the compiled code ends before them and goes on after them. All layers of a kind share the code, made
once for rows of any length.
"""

from __future__ import annotations

import functools
import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vlft.models.cache_name import CACHE
from vlft.models.tree_attention import WholeRow

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def compile_layers(language: Any, backend: str = "inductor") -> None:
    """Has all layers of the LLM but the last, which is narrowed, run compiled code.

    What is to be compiled must be the same code for all layers, not methods of one of them. So
    gate and up, and LoRA's input, are again treated as by transformers and peft: the compiler fuses
    the casts and does not keep the activated gate either.

    Args:
        language: the LLM, with layers as Llama's, prepared for training.
        backend: torch's name of the compiler.
    """
    # What cannot be compiled runs as it is, with a warning.
    torch._dynamo.config.suppress_errors = True
    for layer in language.layers[:-1]:
        for module in layer.modules():
            for name in ("forward", "_cast_input_dtype"):
                if isinstance(vars(module).get(name), partial):
                    delattr(module, name)
        layer.forward = partial(compiled_forward, layer, backend)


def compiled_forward(layer: Any, backend: str, hidden: Tensor, **kwargs: Any) -> Tensor:
    """The layer's output, (1, N, D) of (1, N, D)."""
    if kwargs.get(CACHE) is not None:
        # Replies: each new token would be a shape to compile for.
        usual: Tensor = type(layer).forward(layer, hidden, **kwargs)
        return usual
    # Below transformers' wrappers, which decide about checkpointing and old names of arguments.
    # These are for the last layer; the compiler would make code for each number of blocks.
    kwargs = {k: v for k, v in kwargs.items() if k not in ("kept_row", "positions_to_keep")}
    if "row" in kwargs:
        kwargs["row"] = WholeRow(kwargs["row"])
    run = _compiled(inspect.unwrap(type(layer).forward), backend)
    if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
        again: Tensor = layer._gradient_checkpointing_func(partial(run, layer, **kwargs), hidden)
        return again
    made: Tensor = run(layer, hidden, **kwargs)
    return made


@functools.cache
def _compiled(forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(forward, dynamic=True, backend=backend)
