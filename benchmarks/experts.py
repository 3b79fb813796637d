"""A mixture-of-experts layer of DeepSeek-VL2-small: grouped products against a loop over experts.

Forward and backward of the routed experts (64, of which each token takes 6), weights frozen, with
and without LoRA on them. The loop is how the authors' code trains: each expert picks its tokens by
a mask, runs three linear layers on them and writes the rows back; with LoRA each of its 192 linear
layers has an A and a B. ``peft`` is its own LoRA on parameters, which adds the product of A and B
to the weights in every step.

    python -m benchmarks.experts --output-json benchmarks/results/experts-cpu.json
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import CLOCKS, load_average, machine, measure, write_json
from vlft.checkpoints.adapter import with_grouped_experts
from vlft.models.deepseek_vl2 import DeepseekVL2TextConfig
from vlft.models.experts import PLAIN_EXPERTS

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """Sizes of the layer and its input."""

    tokens: int
    experts: int
    best: int
    hidden: int
    inner: int
    rank: int


@dataclass(frozen=True)
class Work:
    """The input, with the routing that the layer before would have given."""

    hidden: Tensor
    chosen: Tensor
    weights: Tensor


class LoopExperts(nn.Module):
    """The computation as the authors' training code has it."""

    def __init__(self, fused: Any, shape: Shape, *, lora: bool) -> None:
        super().__init__()
        self.fused, self.shape, self.lora = fused, shape, lora
        sizes = {"gate": (shape.hidden, shape.inner), "up": (shape.hidden, shape.inner)}
        sizes["down"] = (shape.inner, shape.hidden)
        self.adapters = nn.ModuleDict()
        for expert in range(shape.experts if lora else 0):
            for name, (inputs, outputs) in sizes.items():
                first = nn.Linear(inputs, shape.rank, bias=False)
                second = nn.Linear(shape.rank, outputs, bias=False)
                nn.init.zeros_(second.weight)  # as peft starts
                self.adapters[f"{expert}-{name}"] = nn.Sequential(first, second)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        flat = chosen.flatten()
        repeated = hidden.repeat_interleave(chosen.shape[1], dim=0)
        rows = torch.empty_like(repeated)
        for expert in range(self.shape.experts):
            mask = flat == expert
            rows[mask] = self.run(expert, repeated[mask])
        return (rows.unflatten(0, chosen.shape) * weights.unsqueeze(-1)).sum(1)

    def run(self, expert: int, rows: Tensor) -> Tensor:
        """One expert on its rows."""
        gate_weight, up_weight = self.fused.gate_up_proj[expert].chunk(2)
        gate = self.linear(f"{expert}-gate", gate_weight, rows)
        up = self.linear(f"{expert}-up", up_weight, rows)
        return self.linear(f"{expert}-down", self.fused.down_proj[expert], F.silu(gate) * up)

    def linear(self, name: str, weight: Tensor, rows: Tensor) -> Tensor:
        """A linear layer, with its addition if there is one."""
        product = F.linear(rows, weight)
        return product + self.adapters[name](rows) if self.lora else product


def fused_experts(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """Frozen experts with random weights."""
    config = DeepseekVL2TextConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.inner,
        n_routed_experts=shape.experts,
        num_experts_per_tok=shape.best,
        topk_method="greedy",
    )
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        experts = PLAIN_EXPERTS(config).to(dtype).requires_grad_(False)
    for weight in experts.parameters():
        weight.normal_(std=0.02)
    return experts


def with_lora(fused: Any, shape: Shape, *, grouped: bool) -> nn.Module:
    """peft's LoRA around the experts, with vlft's forward or with its own."""
    config = LoraConfig(
        r=shape.rank, target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    if grouped:
        with_grouped_experts(config)
    model = get_peft_model(nn.ModuleDict({"experts": fused}), config)
    tuned: nn.Module = model.base_model.model["experts"]
    return tuned


def sides(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Functions that make each side's module, in the order they are run."""

    def loop(lora: bool) -> nn.Module:
        fused = fused_experts(shape, dtype, device)
        return LoopExperts(fused, shape, lora=lora).to(device, dtype)

    return {
        "loop over experts": lambda: loop(False),
        "vlft": lambda: fused_experts(shape, dtype, device),
        "loop over experts, LoRA": lambda: loop(True),
        "peft, LoRA": lambda: with_lora(fused_experts(shape, dtype, device), shape, grouped=False),
        "vlft, LoRA": lambda: with_lora(fused_experts(shape, dtype, device), shape, grouped=True),
    }


def measure_side(
    module: nn.Module, work: Work, device: torch.device, repeats: int, clock: str
) -> dict[str, Any]:
    """Median seconds and peak memory of forward and backward, after one warm-up."""

    def step() -> float:
        module.zero_grad()
        hidden = work.hidden.clone().requires_grad_()
        output = module(hidden, work.chosen, work.weights)
        output.sum().backward()
        return float(output.float().abs().mean())

    step()
    runs = [measure(step, device, clock) for _ in range(repeats)]
    return {
        "seconds": statistics.median(run.seconds for run in runs),
        "peak_mib": max(run.peak_bytes for run in runs) / 2**20,
        "mean_output": runs[-1].value,
    }


def compare(
    shape: Shape, dtype: torch.dtype, device: torch.device, repeats: int, clock: str
) -> list[dict[str, Any]]:
    """Every side on the same work, one module in memory at a time."""
    torch.manual_seed(0)
    scores = torch.randn(shape.tokens, shape.experts, device=device).softmax(-1)
    weights, chosen = scores.topk(shape.best)
    hidden = torch.randn(shape.tokens, shape.hidden, device=device, dtype=dtype)
    work = Work(hidden, chosen, weights.to(dtype))
    rows: list[dict[str, Any]] = []
    for name, make in sides(shape, dtype, device).items():
        torch.manual_seed(1)
        module: nn.Module = make()
        result = measure_side(module, work, device, repeats, clock)
        base = next(
            (
                row
                for row in rows
                if row["side"].startswith("loop")
                and (row["side"].endswith("LoRA") == name.endswith("LoRA"))
            ),
            None,
        )
        result["speedup"] = base["seconds"] / result["seconds"] if base else 1.0
        rows.append({"side": name, **result})
        del module
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The result as Markdown."""
    lines = [
        "| side | s, forward and backward | speed-up | peak memory, MiB | mean of the output |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['side']} | {row['seconds']:.3f} | {row['speedup']:.1f} | "
            f"{row['peak_mib']:.0f} | {row['mean_output']:.5f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the comparison and prints the table."""
    arguments = arguments_of()
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shape = Shape(
        arguments.tokens, arguments.experts, 6, arguments.hidden, arguments.inner, arguments.rank
    )
    rows = compare(shape, DTYPES[arguments.dtype], device, arguments.repeats, arguments.clock)
    print(table(rows))
    if arguments.output_json:
        settings = {k: str(v) for k, v in vars(arguments).items()}
        content = {"settings": settings, "machine": machine(device), "rows": rows}
        write_json(arguments.output_json, {**content, "load_average": load_average()})


def arguments_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=1408)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    parser.add_argument("--output-json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
