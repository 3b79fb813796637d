"""Attention of a packed row: by trees, against a dense mask and FlexAttention.

Forward and backward of one attention layer on rows of images with five questions each. On CUDA
FlexAttention runs too, compiled; torch has no backward pass of it on the CPU.

    python -m benchmarks attention --output benchmarks/results/attention-cpu
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.command import DTYPES, markdown, new_parser, note, prepare, write
from benchmarks.measure import Measured, measure
from vlft.data.encode import IGNORE, EncodedSample
from vlft.models.tree_attention import tree_attention
from vlft.packing.attention import additive_mask, block_mask, row_attention
from vlft.packing.prefix_tree import pack

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlft.packing.prefix_tree import PackedBatch

TRUNK, QUESTIONS, BRANCH = 622, 5, 44
HEADS, HEAD = 8, 64
IMAGE_TOKEN = -1


@dataclass(frozen=True)
class Result:
    """A row of the table.

    Attributes:
        tokens: of the row.
        side: by name.
        seconds: forward and backward, the mask too.
        peak_mib: memory that it adds.
        output: mean of the squared output, which the sides share.
    """

    tokens: int
    side: str
    seconds: float
    peak_mib: float
    output: float


def main(arguments: list[str]) -> None:
    """Measures, writes the files, prints the table."""
    parser = new_parser("attention", __doc__, repeats=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    options = parser.parse_args(arguments)
    device, content = prepare(options)
    results: list[Result] = []
    for tokens in options.tokens:
        row = random_row(tokens).to(device)
        torch.manual_seed(0)
        size = (1, HEADS, len(row), HEAD)
        inputs = [
            torch.randn(size, device=device, dtype=DTYPES[options.dtype], requires_grad=True)
            for _ in range(3)
        ]
        for name, attend in sides(row, inputs, device).items():
            step = step_of(attend, inputs)
            runs = [measure(step, device, options.clock) for _ in range(options.repeats + 1)]
            results.append(result_of(len(row), name, runs[1:]))
            note(f"{len(row)} tokens, {name}: done")
    write(options.output, {**content, "results": [asdict(r) for r in results]}, table(results))
    print(table(results))


def random_row(tokens: int) -> PackedBatch:
    """Images with five questions each, as many as fit."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(tokens // (TRUNK + QUESTIONS * BRANCH)):
        trunk = torch.randint(1000, (TRUNK,), generator=generator)
        for _ in range(QUESTIONS):
            branch = torch.randint(1000, (BRANCH,), generator=generator)
            ids = torch.cat([trunk, branch])
            labels = torch.cat([torch.full_like(trunk, IGNORE), branch])
            samples.append(EncodedSample(ids, labels, "", ()))
    return pack(samples, IMAGE_TOKEN)


def sides(
    row: PackedBatch, inputs: list[Tensor], device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """The ways to attend, by name: (1, H, N, d) each, the mask made anew each time."""
    query, key, value = inputs
    module = nn.Module()

    def dense() -> Tensor:
        mask = additive_mask(row.exit, query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def trees() -> Tensor:
        told = row_attention(row.trees, row.exit, query.dtype)
        return tree_attention(module, query, key, value, None, row=told)[0].transpose(1, 2)

    found: dict[str, Callable[[], Tensor]] = {"dense mask": dense, "trees": trees}
    if device.type == "cuda":
        from torch.nn.attention.flex_attention import flex_attention

        compiled: Any = torch.compile(flex_attention)
        found["FlexAttention"] = lambda: compiled(
            query, key, value, block_mask=block_mask(row.exit)
        )
    return found


def step_of(attend: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], float]:
    """Forward and backward; returns the mean of the squared output."""

    def step() -> float:
        output = attend().float().square().mean()
        torch.autograd.grad(output, inputs)
        return output.item()

    return step


def result_of(tokens: int, name: str, runs: list[Measured]) -> Result:
    """The row of a side."""
    seconds = statistics.median(run.seconds for run in runs)
    peak = max(run.peak_bytes for run in runs) / 2**20
    return Result(tokens, name, seconds, peak, runs[-1].value)


def table(results: list[Result]) -> str:
    """The results in Markdown; the dense mask is the side compared with."""
    rows = []
    for result in results:
        base = next(other for other in results if other.tokens == result.tokens)
        rows.append(
            [
                result.side,
                str(result.tokens),
                f"{result.seconds:.3f}",
                f"{base.seconds / result.seconds:.1f}",
                f"{result.peak_mib:.0f}",
                f"{result.output:.6f}",
            ]
        )
    columns = ("side", "tokens", "s", "speed-up", "peak memory, MiB", "mean square of the output")
    return markdown(columns, rows, words=1)
