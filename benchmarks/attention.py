"""Attention of a packed row: by segments, against a dense mask and FlexAttention.

Forward and backward of one attention layer on rows of images with five questions each. On CUDA
FlexAttention runs too, compiled; torch has no backward pass of it on the CPU. ``--count`` computes
nothing: it counts the scores of the rows that vlft packs of the samples of a workload.

    python -m benchmarks attention --output benchmarks/results/attention-cpu
    python -m benchmarks attention --count
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.command import DTYPES, new_parser, note, prepare, publish
from benchmarks.job import make_job
from benchmarks.measure import measure_steps
from benchmarks.sides import make_samples
from vlft.data.encode import IGNORE, EncodedSample
from vlft.models.tree_attention import fused_attention, tree_attention
from vlft.packing.attention import additive_mask, block_mask, row_attention
from vlft.packing.prefix_tree import pack

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlft.packing.prefix_tree import PackedBatch

# Lengths in tokens of the system prompt, of an image, and of a question with its reply, and the
# number of questions that are asked about each image.
SYSTEM, IMAGE, BRANCH, QUESTIONS = 45, 577, 44, 5
HEADS, HEAD_DIM = 8, 64
COLUMNS = {
    "side": "{side}", "tokens": "{tokens}", "s": "{seconds:.3f}", "speed-up": "{speedup:.1f}",
    "peak memory, MiB": "{peak_mib:.0f}", "mean square of the output": "{value:.6f}",
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measures, writes the files, prints the table."""
    parser = new_parser("attention", __doc__, repeats=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    shown = "scores computed on the CPU, over those needed"
    parser.add_argument("--count", action="store_true", help=shown)
    options = parser.parse_args(arguments)
    if options.count:
        ratios = ", ".join(f"{name} {score_ratio(name):.3f}" for name in ("q1", "q5", "mixed"))
        print(f"scores computed / needed: {ratios}")
        return
    device, content = prepare(options)
    results: list[dict[str, Any]] = []
    for limit in options.tokens:
        row = random_row(limit).to(device)
        torch.manual_seed(0)
        shape, dtype = (1, HEADS, len(row), HEAD_DIM), DTYPES[options.dtype]
        inputs = [torch.randn(shape, device=device, dtype=dtype) for _ in range(3)]
        base: dict[str, float] = {}
        for side, attend in sides(row, inputs).items():
            step = partial(forward_and_backward, attend, inputs)
            found = measure_steps(step, device, options.clock, options.repeats)
            base = base or found
            speedup = base["seconds"] / found["seconds"]
            results.append({"tokens": len(row), "side": side, "speedup": speedup, **found})
            note(f"{len(row)} tokens, {side}: done")
    publish(options, content, COLUMNS, results)


def score_ratio(workload: str) -> float:
    """The number of attention scores that are computed, divided by the number that is needed."""
    case = argparse.Namespace(
        model="deepseek-vl", workload=workload, scale="middle", dtype="float32", device="cpu",
        samples=10,
    )  # fmt: skip
    built, samples = make_samples(case)
    rows = make_job(built, samples).planner.packer.rows(samples.samples)
    needed = sum(int((row.position_ids + 1).sum()) for row in rows)
    made = [row_attention(row.segments, row.exit, torch.float32, fused=False) for row in rows]
    return sum(part.block.scores for parts in made for part in parts) / needed


def random_row(tokens: int) -> PackedBatch:
    """Images with their questions, as many as fit."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    system = torch.randint(1000, (SYSTEM,), generator=generator)
    for _ in range((tokens - SYSTEM) // (IMAGE + QUESTIONS * BRANCH)):
        image = torch.randint(1000, (IMAGE,), generator=generator)
        for _ in range(QUESTIONS):
            branch = torch.randint(1000, (BRANCH,), generator=generator)
            ids = torch.cat([system, image, branch])
            labels = ids.clone()
            labels[:-BRANCH] = IGNORE
            samples.append(EncodedSample(ids, labels, "", ()))
    return pack(samples, image_token_id=-1)


def sides(row: PackedBatch, inputs: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """The ways to attend, by name: (1, H, N, d) each, the mask made anew each time."""
    query, key, value = (tensor.requires_grad_() for tensor in inputs)

    def dense() -> Tensor:
        mask = additive_mask(row.exit, query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def fused() -> Tensor:
        blocks = row_attention(row.segments, row.exit, query.dtype, fused=True)
        made = fused_attention(blocks, query, key, value, HEAD_DIM**-0.5)
        return made.transpose(1, 2)

    def products() -> Tensor:
        blocks = row_attention(row.segments, row.exit, query.dtype, fused=False)
        return tree_attention(nn.Module(), query, key, value, None, row=blocks)[0].transpose(1, 2)

    found: dict[str, Callable[[], Tensor]] = {"dense mask": dense, "segments, fused kernels": fused}
    if query.device.type == "cpu":
        found["segments, products"] = products
    else:
        from torch.nn.attention.flex_attention import flex_attention

        compiled: Any = torch.compile(flex_attention)
        found["FlexAttention"] = lambda: compiled(
            query, key, value, block_mask=block_mask(row.exit)
        )
    return found


def forward_and_backward(attend: Callable[[], Tensor], inputs: list[Tensor]) -> float:
    """The mean of the squared output, after a backward pass from it."""
    output = attend().float().square().mean()
    torch.autograd.grad(output, inputs)
    return output.item()
