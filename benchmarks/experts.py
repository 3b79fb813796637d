"""A mixture-of-experts layer of DeepSeek-VL2-small: grouped products against a loop over experts.

Forward and backward of the routed experts (64, of which each token takes 6), weights frozen, with
and without LoRA on them. The loop is how the authors' code trains: each expert picks its tokens by
a mask, runs three linear layers on them and writes the rows back; with LoRA each of its 192 linear
layers has an A and a B. ``peft`` is its own LoRA on parameters, which adds the product of A and B
to the weights in every step.

    python -m benchmarks experts --output benchmarks/results/experts-cpu
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.command import DTYPES, markdown, new_parser, prepare, write
from benchmarks.measure import measure
from vlft.checkpoints.adapter import register_experts_layer
from vlft.models.deepseek_vl2 import DeepseekVL2TextConfig
from vlft.models.experts import PLAIN_EXPERTS

if TYPE_CHECKING:
    import argparse


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
        return (rows.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(1)

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
        register_experts_layer(config)
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
        return float(output.detach().float().abs().mean())

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
    columns = (
        "side", "s, forward and backward", "speed-up", "peak memory, MiB", "mean of the output",
    )  # fmt: skip
    cells = [
        [
            row["side"],
            f"{row['seconds']:.3f}",
            f"{row['speedup']:.1f}",
            f"{row['peak_mib']:.0f}",
            f"{row['mean_output']:.5f}",
        ]
        for row in rows
    ]
    return markdown(columns, cells, words=1)


def main(arguments: list[str]) -> None:
    """Runs the comparison, prints the table, writes the files."""
    options = parse_arguments(arguments)
    device, content = prepare(options)
    shape = Shape(options.tokens, options.experts, 6, options.hidden, options.inner, options.rank)
    rows = compare(shape, DTYPES[options.dtype], device, options.repeats, options.clock)
    print(table(rows))
    write(options.output, {**content, "rows": rows}, table(rows))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = new_parser("experts", __doc__, repeats=3)
    add = parser.add_argument
    add("--dtype", default="bfloat16", choices=DTYPES)
    add("--tokens", type=int, default=1024)
    add("--experts", type=int, default=64)
    add("--hidden", type=int, default=2048)
    add("--inner", type=int, default=1408)
    add("--rank", type=int, default=8)
    return parser.parse_args(arguments)
