"""A mixture-of-experts layer of DeepSeek-VL2-small: grouped products against a loop over experts.

Forward and backward of the routed experts (64, of which each token takes 6), weights frozen, with
and without LoRA on them. The loop is how the authors' code trains: each expert picks its tokens by
a mask, runs three linear layers on them and writes the rows back; with LoRA each of its 192 linear
layers has an A and a B. ``peft`` is its own LoRA on parameters, which adds the product of A and B
to the weights in every step. vlft's products are computed in both ways of models.grouped, by
torch's ``grouped_mm`` and by a loop; ``vlft`` is what it chooses for the device.

    python -m benchmarks experts --output benchmarks/results/experts-cpu
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.command import DTYPES, new_parser, note, prepare, publish
from benchmarks.measure import measure_steps
from vlft.checkpoints.adapter import register_experts_layer
from vlft.models.deepseek_vl2 import DeepseekVL2TextConfig
from vlft.models.experts import IMPLEMENTATION, PLAIN_EXPERTS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, RANK = 64, 6, 2048, 1408, 8
COLUMNS = {
    "side": "{side}", "s, forward and backward": "{seconds:.3f}", "speed-up": "{speedup:.1f}",
    "peak memory, MiB": "{peak_mib:.0f}", "mean of the output": "{value:.5f}",
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measures, writes the files, prints the table."""
    parser = new_parser("experts", __doc__, repeats=3)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args(arguments)
    _, content = prepare(options)
    publish(options, content, COLUMNS, compare(options))


class LoopExperts(nn.Module):
    """The computation as the authors' training code has it; no LoRA with a rank of 0."""

    def __init__(self, fused: Any, rank: int) -> None:
        super().__init__()
        self.fused = fused
        experts, hidden, width = fused.down_proj.shape
        sizes = [(hidden, width), (hidden, width), (width, hidden)] * (experts if rank else 0)
        self.adapters = nn.ModuleList(_lora(*size, rank) for size in sizes)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        flat = chosen.flatten()
        repeated = hidden.repeat_interleave(chosen.shape[1], dim=0)
        rows = torch.empty_like(repeated)
        for expert, down in enumerate(self.fused.down_proj):
            mask = flat == expert
            gate, up = self.fused.gate_up_proj[expert].chunk(2)
            inputs = repeated[mask]
            gated = F.silu(self.linear(3 * expert, gate, inputs))
            rows[mask] = self.linear(
                3 * expert + 2, down, gated * self.linear(3 * expert + 1, up, inputs)
            )
        return (rows.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(1)

    def linear(self, index: int, weight: Tensor, rows: Tensor) -> Tensor:
        """A linear layer, with LoRA if there is any."""
        product = F.linear(rows, weight)
        return product + self.adapters[index](rows) if self.adapters else product


class Forced(nn.Module):
    """Experts whose products are, or are not, a loop, whatever the device."""

    def __init__(self, inner: nn.Module, *, loop: bool) -> None:
        super().__init__()
        self.inner, self.loop = inner, loop

    def forward(self, *inputs: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        with patch("vlft.models.experts.loops_over_groups", lambda *_: self.loop):
            output: Tensor = self.inner(*inputs)
        return output


def _lora(inputs: int, outputs: int, rank: int) -> nn.Module:
    first, second = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
    nn.init.zeros_(second.weight)  # as peft starts
    return nn.Sequential(first, second)


def sides(options: argparse.Namespace) -> dict[str, Callable[[], nn.Module]]:
    """Functions that make each side's module, in the order they are run."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]

    def fused() -> Any:
        config = DeepseekVL2TextConfig(
            hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, n_routed_experts=EXPERTS,
            num_experts_per_tok=TOP_K, topk_method="greedy",
        )  # fmt: skip
        config._experts_implementation = IMPLEMENTATION
        with device:
            experts = PLAIN_EXPERTS[0](config).to(dtype).requires_grad_(False)
        for weight in experts.parameters():
            weight.normal_(std=0.02)
        return experts

    def loop(rank: int) -> nn.Module:
        return LoopExperts(fused(), rank).to(device, dtype)

    def peft(grouped: bool) -> nn.Module:
        names = ["experts.gate_up_proj", "experts.down_proj"]
        config = LoraConfig(r=RANK, target_parameters=names)
        if grouped:
            register_experts_layer(config)
        model = get_peft_model(nn.ModuleDict({"experts": fused()}), config)
        tuned: nn.Module = model.base_model.model["experts"]
        return tuned

    return {
        "loop over experts": lambda: loop(0),
        "vlft": fused,
        "vlft by grouped_mm": lambda: Forced(fused(), loop=False),
        "vlft by a loop": lambda: Forced(fused(), loop=True),
        "loop over experts, LoRA": lambda: loop(RANK),
        "peft, LoRA": lambda: peft(False),
        "vlft, LoRA": lambda: peft(True),
        "vlft by grouped_mm, LoRA": lambda: Forced(peft(True), loop=False),
        "vlft by a loop, LoRA": lambda: Forced(peft(True), loop=True),
    }


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every side on the same tokens and routing, one module in memory at a time."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    torch.manual_seed(0)
    scores = torch.randn(options.tokens, EXPERTS, device=device).softmax(-1)
    weights, chosen = scores.topk(TOP_K)
    weights = weights.to(dtype)
    tokens = torch.randn(options.tokens, HIDDEN, device=device, dtype=dtype)

    def step(module: nn.Module) -> float:
        module.zero_grad()
        output = module(tokens.clone().requires_grad_(), chosen, weights)
        output.sum().backward()
        return float(output.detach().float().abs().mean())

    rows: list[dict[str, Any]] = []
    base = 0.0
    for name, make in sides(options).items():
        torch.manual_seed(1)
        found = measure_steps(partial(step, make()), device, options.clock, options.repeats)
        base = found["seconds"] if name.startswith("loop") else base
        rows.append({"side": name, "speedup": base / found["seconds"], **found})
        note(f"{name}: done")
    return rows
