"""The loss of the trained tokens: vlft's chunks against torch's ``linear_cross_entropy``.

Forward and backward with a frozen vocabulary projection, as in a LoRA run; the reference loss is
computed in float64 from the same inputs.

    python -m benchmarks loss --output benchmarks/results/loss-cpu
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.command import DTYPES, new_parser, prepare, publish
from benchmarks.measure import measure_steps
from vlft.training.loss import token_loss_sum

if TYPE_CHECKING:
    import argparse

HIDDEN, VOCABULARY = 1024, 102400
Kernel = Callable[[Tensor, Tensor, nn.Linear], Tensor]
COLUMNS = {
    "dtype": "{dtype}", "kernel": "{kernel}", "S": "{positions}",
    "s, forward and backward": "{seconds:.3f}", "peak memory, MiB": "{peak_mib:.0f}",
    "loss": "{loss:.3f}", "float64 loss": "{reference:.3f}",
    "gradient error": "{gradient_error:.1e}",
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measures, prints the table, writes the files."""
    parser = new_parser("loss", __doc__, repeats=5)
    parser.add_argument("--positions", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    options = parser.parse_args(arguments)
    device, content = prepare(options)
    results = [
        result
        for dtype in options.dtypes
        for positions in options.positions
        for result in compare(options, dtype, positions, device)
    ]
    publish(options, content, COLUMNS, results)


def vlft_loss(hidden: Tensor, target: Tensor, head: nn.Linear) -> Tensor:
    """vlft's kernel with all weights 1."""
    return token_loss_sum(hidden, target, torch.ones(len(target), device=hidden.device), head)


def torch_loss(hidden: Tensor, target: Tensor, head: nn.Linear, **options: Any) -> Tensor:
    """torch's chunked kernel with these options."""
    chosen = nn.LinearCrossEntropyOptions(**options)
    return F.linear_cross_entropy(hidden, head.weight, target, reduction="sum", options=chosen)


def compare(
    options: argparse.Namespace, dtype: str, positions: int, device: torch.device
) -> list[dict[str, Any]]:
    """All kernels on the same random inputs: loss, its gradient's error, seconds and peak."""
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    nn.init.normal_(head.weight, std=0.02)
    head = head.to(device, DTYPES[dtype]).requires_grad_(False)
    hidden = torch.randn(positions, HIDDEN).to(device, DTYPES[dtype]).requires_grad_()
    target = torch.randint(VOCABULARY, (positions,)).to(device)

    exact = hidden.detach().double().requires_grad_()
    reference = F.cross_entropy(F.linear(exact, head.weight.double()), target, reduction="sum")
    (exact_gradient,) = torch.autograd.grad(reference, exact)

    def step(kernel: Kernel) -> float:
        hidden.grad = None
        loss = kernel(hidden, target, head)
        torch.autograd.backward(loss)
        return loss.item()

    kernels: dict[str, Kernel] = {
        "vlft": vlft_loss,
        "torch, default options": torch_loss,
        # By default a chunk holds a few rows.
        "torch, one chunk": partial(torch_loss, batch_chunk_size=positions, chunking_method=None),
    }
    results = []
    for name, kernel in kernels.items():
        found = measure_steps(partial(step, kernel), device, options.clock, options.repeats)
        assert hidden.grad is not None
        error = (hidden.grad.double() - exact_gradient).norm() / exact_gradient.norm()
        case = {"dtype": dtype, "positions": positions, "kernel": name, **found}
        losses = {"loss": found["value"], "reference": reference.item()}
        results.append({**case, **losses, "gradient_error": error.item()})
    return results
