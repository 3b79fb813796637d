"""The loss of the targets: vlft's kernel against torch's ``linear_cross_entropy``.

Forward and backward with a frozen vocabulary projection, as in a LoRA run; the reference loss is
computed in float64 from the same inputs.

    python -m benchmarks loss --output benchmarks/results/loss-cpu
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.command import DTYPES, markdown, new_parser, prepare, write
from benchmarks.measure import measure
from vlft.training.loss import token_loss_sum

if TYPE_CHECKING:
    import argparse

Kernel = Callable[[Tensor, Tensor, nn.Linear], Tensor]


def vlft_loss(hidden: Tensor, target: Tensor, head: nn.Linear) -> Tensor:
    """vlft's kernel with all weights 1."""
    weight = torch.ones(len(target), device=hidden.device)
    return token_loss_sum(hidden, target, weight, head)


def torch_loss(**options: Any) -> Kernel:
    """torch's chunked kernel with these options."""

    def compute(hidden: Tensor, target: Tensor, head: nn.Linear) -> Tensor:
        chosen = nn.LinearCrossEntropyOptions(**options)
        return F.linear_cross_entropy(hidden, head.weight, target, reduction="sum", options=chosen)

    return compute


def kernels(positions: int) -> dict[str, Kernel]:
    """What is compared: torch's own chunks hold a few rows, so one chunk of all is tried too."""
    return {
        "vlft": vlft_loss,
        "torch, default options": torch_loss(),
        "torch, one chunk": torch_loss(batch_chunk_size=positions, chunking_method=None),
    }


def measure_kernel(
    kernel: Kernel, hidden: Tensor, target: Tensor, head: nn.Linear, repeats: int, clock: str
) -> dict[str, Any]:
    """Loss, median seconds and peak memory of forward and backward, after one warm-up."""

    def step() -> float:
        hidden.grad = None
        loss = kernel(hidden, target, head)
        torch.autograd.backward(loss)
        return loss.item()

    runs = [measure(step, hidden.device, clock) for _ in range(repeats + 1)][1:]
    return {
        "loss": runs[-1].value,
        "seconds": statistics.median(run.seconds for run in runs),
        "peak_mib": max(run.peak_bytes for run in runs) / 2**20,
    }


def reference_loss(hidden: Tensor, target: Tensor, head: nn.Linear) -> tuple[float, Tensor]:
    """Loss and gradient of ``hidden`` in float64."""
    exact = hidden.detach().double().requires_grad_()
    loss = F.cross_entropy(F.linear(exact, head.weight.double()), target, reduction="sum")
    torch.autograd.backward(loss)
    assert exact.grad is not None
    return loss.item(), exact.grad


def table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    columns = (
        "dtype", "kernel", "S", "s, forward and backward", "peak memory, MiB", "loss",
        "float64 loss", "gradient error",
    )  # fmt: skip
    cells = [
        [
            r["dtype"],
            r["kernel"],
            str(r["positions"]),
            f"{r['seconds']:.3f}",
            f"{r['peak_mib']:.0f}",
            f"{r['loss']:.3f}",
            f"{r['reference']:.3f}",
            f"{r['gradient_error']:.1e}",
        ]
        for r in results
    ]
    return markdown(columns, cells, words=2)


def compare(
    options: argparse.Namespace, dtype: str, positions: int, device: torch.device
) -> list[dict[str, Any]]:
    """All kernels on the same random inputs."""
    torch.manual_seed(0)
    head = nn.Linear(options.hidden, options.vocabulary, bias=False)
    nn.init.normal_(head.weight, std=0.02)
    head = head.to(device, DTYPES[dtype]).requires_grad_(False)
    hidden = torch.randn(positions, options.hidden).to(device, DTYPES[dtype]).requires_grad_()
    target = torch.randint(options.vocabulary, (positions,)).to(device)
    reference, exact = reference_loss(hidden, target, head)
    results = []
    for name, kernel in kernels(positions).items():
        found = measure_kernel(kernel, hidden, target, head, options.repeats, options.clock)
        assert hidden.grad is not None
        error = float((hidden.grad.double() - exact).norm() / exact.norm())
        case = {"dtype": dtype, "positions": positions, "kernel": name, "reference": reference}
        results.append({**case, "gradient_error": error, **found})
    return results


def main(arguments: list[str]) -> None:
    """Measures, prints the table, writes the files."""
    parser = new_parser("loss", __doc__, repeats=5)
    add = parser.add_argument
    add("--positions", type=int, nargs="+", default=[64, 512])
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    add("--hidden", type=int, default=1024)
    add("--vocabulary", type=int, default=102400)
    options = parser.parse_args(arguments)
    device, content = prepare(options)
    results: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        for positions in options.positions:
            results += compare(options, dtype, positions, device)
    print(table(results))
    write(options.output, {**content, "results": results}, table(results))
