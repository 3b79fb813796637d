"""The loss of the targets: vlft's kernel against torch's ``linear_cross_entropy``.

Forward and backward with a frozen vocabulary projection, as in a LoRA run; the reference loss is
computed in float64 from the same inputs.

    python -m benchmarks.loss --output-json benchmarks/results/loss-cpu.json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import CLOCKS, load_average, machine, measure, write_json
from vlft.training.loss import token_loss_sum

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
        loss.backward()
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
    loss.backward()
    assert exact.grad is not None
    return loss.item(), exact.grad


def table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        "| dtype | S | kernel | s, forward + backward | peak memory, MiB | loss | float64 loss "
        "| gradient error |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['dtype']} | {r['positions']} | {r['kernel']} | {r['seconds']:.3f} "
        f"| {r['peak_mib']:.0f} | {r['loss']:.3f} | {r['reference']:.3f} "
        f"| {r['gradient_error']:.1e} |"
        for r in results
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table, writes the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--positions", type=int, nargs="+", default=[64, 512])
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    add("--hidden", type=int, default=1024)
    add("--vocabulary", type=int, default=102400)
    add("--repeats", type=int, default=5)
    add("--threads", type=int, help="default: torch's own")
    add("--clock", default="wall", choices=sorted(CLOCKS))
    add("--output-json", type=Path)
    options = parser.parse_args(arguments)
    device, load_before = torch.device(options.device), load_average()
    if options.threads:
        torch.set_num_threads(options.threads)
    results: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        for positions in options.positions:
            results += compare(options, getattr(torch, dtype), positions, device)
    print(table(results))
    if options.output_json:
        found = {"machine": machine(device), "load_before": load_before, "results": results}
        write_json(options.output_json, found)


def compare(
    options: argparse.Namespace, dtype: torch.dtype, positions: int, device: torch.device
) -> list[dict[str, Any]]:
    """All kernels on the same random inputs."""
    torch.manual_seed(0)
    head = nn.Linear(options.hidden, options.vocabulary, bias=False)
    nn.init.normal_(head.weight, std=0.02)
    head = head.to(device, dtype).requires_grad_(False)
    hidden = torch.randn(positions, options.hidden).to(device, dtype).requires_grad_()
    target = torch.randint(options.vocabulary, (positions,)).to(device)
    reference, exact = reference_loss(hidden, target, head)
    results = []
    for name, kernel in kernels(positions).items():
        found = measure_kernel(kernel, hidden, target, head, options.repeats, options.clock)
        assert hidden.grad is not None
        error = float((hidden.grad.double() - exact).norm() / exact.norm())
        shown = str(dtype).removeprefix("torch.")
        results.append(
            {
                "dtype": shown,
                "positions": positions,
                "kernel": name,
                "reference": reference,
                "gradient_error": error,
                **found,
            }
        )
    return results


if __name__ == "__main__":
    main()
