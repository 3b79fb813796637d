"""Attention of a packed row: by segments, against a dense mask, FlexAttention and torch's varlen.

Forward and backward of one attention layer on rows of images with five questions each, after a
system prompt that all share. On CUDA FlexAttention (compiled), ``torch.nn.attention.varlen`` with
each segment as queries and its path as keys, and cuDNN's kernels run too; ``new lengths`` is the
first call on a row of other lengths, as nearly every step has them. ``--count`` computes nothing:
it counts the scores of the rows that vlft packs of the samples of a workload.

    python -m benchmarks attention --output benchmarks/results/attention-cpu
    python -m benchmarks attention --count
"""

from __future__ import annotations

import argparse
import functools
import math
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.command import DTYPES, markdown, new_parser, prepare, record
from benchmarks.measure import measure, measure_steps
from benchmarks.sides import make_samples
from vlft.config import JOINED_TOKENS, TOKENS_PER_ROW
from vlft.data.encode import IGNORE, EncodedSample
from vlft.models.tree_attention import fused_attention, tree_attention
from vlft.packing.attention import additive_mask, block_mask, row_attention
from vlft.packing.packer import Packer
from vlft.packing.prefix_tree import pack

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vlft.models.tree_attention import Block
    from vlft.packing.batch import PackedBatch

Side: TypeAlias = "Callable[[], float]"

# Lengths in tokens of the system prompt, of an image, and of a question with its reply, and the
# number of questions that are asked about each image.
SYSTEM, IMAGE, BRANCH, QUESTIONS = 45, 577, 44, 5
COLUMNS = {
    "heads": "{heads}", "side": "{side}", "tokens": "{tokens}", "s": "{seconds:.4f}",
    "s, new lengths": "{new_seconds:.4f}", "speed-up": "{speedup:.1f}",
    "peak memory, MiB": "{peak_mib:.0f}", "mean square of the output": "{value:.6f}",
    "note": "{note}",
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measures every side, writes its result at once, so that a stop loses none, and prints all."""
    parser = new_parser("attention", __doc__, repeats=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    shown = "number x size of queries and keys / size of values; default: 8x64"
    parser.add_argument("--heads", nargs="+", default=["8x64"], help=shown)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    shown = "scores computed on the CPU, over those needed"
    parser.add_argument("--count", action="store_true", help=shown)
    options = parser.parse_args(arguments)
    if options.count:
        ratios = ", ".join(f"{name} {score_ratio(name):.3f}" for name in ("q1", "q5", "mixed"))
        print(f"scores computed / needed: {ratios}")
        return
    device, content = prepare(options)
    for heads in options.heads:
        for limit in options.tokens:
            # The second row has another length of every branch.
            rows = [random_row(limit, branch).to(device) for branch in (BRANCH, BRANCH + 1)]
            dtype, base = DTYPES[options.dtype], math.nan
            made = [sides(row, random_inputs(row, heads, dtype)) for row in rows]
            for side, attend in made[0].items():
                found = attempt(attend, made[1][side], device, options)
                base = found["seconds"] if side == "dense mask" else base
                found |= {"heads": heads, "side": side, "tokens": len(rows[0])}
                found |= {"speedup": base / found["seconds"]}
                record(options, content, COLUMNS, found)
    print(markdown(COLUMNS, content["results"]))


def attempt(
    attend: Side, on_other_lengths: Side, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """The figures of a side, or why there are none."""
    try:
        found: dict[str, Any] = measure_steps(attend, device, options.clock, options.repeats)
        again = measure(on_other_lengths, device, options.clock)
    except (RuntimeError, NotImplementedError, ImportError, TypeError, ValueError) as error:
        nothing = dict.fromkeys(("seconds", "new_seconds", "peak_mib", "value"), math.nan)
        return {**nothing, "note": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"}
    return {**found, "new_seconds": again.seconds, "note": ""}


def random_inputs(row: PackedBatch, heads: str, dtype: torch.dtype) -> list[Tensor]:
    """(1, H, N, d) queries and keys, and (1, H, N, x) values, of ``HxD`` or ``HxD/X``."""
    number, sizes = heads.split("x")
    size, _, of_values = sizes.partition("/")
    torch.manual_seed(0)
    device = row.exit.device
    return [
        torch.randn((1, int(number), len(row), int(s)), device=device, dtype=dtype)
        for s in (size, size, of_values or size)
    ]


def score_ratio(workload: str) -> float:
    """The number of attention scores that are computed, divided by the number that is needed."""
    case = argparse.Namespace(
        model="deepseek-vl", workload=workload, scale="middle", dtype="float32", device="meta",
        samples=10,
    )  # fmt: skip
    built, samples = make_samples(case)
    # As a run on the CPU packs them.
    limits = TOKENS_PER_ROW["cpu"], JOINED_TOKENS["cpu"]
    rows = Packer(built.native["image_token_id"], *limits).rows(samples.samples)
    needed = sum(int((row.position_ids + 1).sum()) for row in rows)
    made = [row_attention(row.segments, row.exit, torch.float32, fused=False) for row in rows]
    return sum(part.block.scores for parts in made for part in parts) / needed


def random_row(tokens: int, branch: int = BRANCH) -> PackedBatch:
    """Images with their questions, as many as fit if a branch has BRANCH tokens."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    system = torch.randint(1000, (SYSTEM,), generator=generator)
    for _ in range((tokens - SYSTEM) // (IMAGE + QUESTIONS * BRANCH)):
        image = torch.randint(1000, (IMAGE,), generator=generator)
        for _ in range(QUESTIONS):
            asked = torch.randint(1000, (branch,), generator=generator)
            ids = torch.cat([system, image, asked])
            labels = ids.clone()
            labels[:-branch] = IGNORE
            samples.append(EncodedSample(ids, labels, "", ()))
    return pack(samples, image_token_id=-1)


def sides(row: PackedBatch, inputs: list[Tensor]) -> dict[str, Side]:
    """Forward and backward pass of each way to attend, by name; masks are made anew each time."""
    query, key, value = (tensor.requires_grad_() for tensor in inputs)
    scaling = query.shape[-1] ** -0.5

    def dense() -> Tensor:
        mask = additive_mask(row.exit, query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def fused(*, cudnn: bool = False) -> Tensor:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        blocks = row_attention(row.segments, row.exit, query.dtype, fused=True)
        return fused_attention(blocks, query, key, value, scaling).transpose(1, 2)

    def products() -> Tensor:
        blocks = row_attention(row.segments, row.exit, query.dtype, fused=False)
        return tree_attention(nn.Module(), query, key, value, None, row=blocks)[0].transpose(1, 2)

    def flex() -> Tensor:
        found: Tensor = compiled_flex()(query, key, value, block_mask=block_mask(row.exit))
        return found

    def varlen() -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        keys, starts, ends = varlen_plan(row.segments)
        at = torch.tensor(keys, device=query.device)
        first, last = (
            torch.tensor(b, device=query.device, dtype=torch.int32) for b in (starts, ends)
        )
        queries, *others = (rows[0].transpose(0, 1) for rows in (query, key, value))
        taken, values = (rows.index_select(0, at) for rows in others)
        most, longest = (max(b - a for a, b in pairwise(bound)) for bound in (starts, ends))
        # A query attends to its path and, at the lower right, causally to its own segment.
        found: Any = varlen_attn(
            queries, taken, values, first, last, most, longest, window_size=(-1, 0)
        )
        attended: Tensor = found.transpose(0, 1).unsqueeze(0)
        return attended

    ways: dict[str, Callable[[], Tensor]] = {"dense mask": dense, "segments, fused kernels": fused}
    if query.device.type == "cpu":
        ways["segments, products"] = products
    else:
        ways["segments, cuDNN's kernels too"] = partial(fused, cudnn=True)
        ways |= {"FlexAttention": flex, "varlen": varlen}
    return {name: partial(forward_and_backward, way, inputs) for name, way in ways.items()}


@functools.cache
def compiled_flex() -> Any:
    """FlexAttention, compiled once."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def varlen_plan(segments: Sequence[Block]) -> tuple[list[int], list[int], list[int]]:
    """A row for variable-length attention, with its segments as sequences of queries.

    Returns:
        The tokens of the row that are keys, those of each segment's path and its own after each
        other; where the queries of each segment start, and where its keys do, with the ends last.
    """
    keys: list[int] = []
    starts, ends = [0], [0]
    for segment in segments:
        for first, end in (*segment.context, (segment.first, segment.end)):
            keys += range(first, end)
        starts.append(segment.end)
        ends.append(len(keys))
    return keys, starts, ends


def forward_and_backward(attend: Callable[[], Tensor], inputs: list[Tensor]) -> float:
    """The mean of the squared output, after a backward pass from it."""
    output = attend().float().square().mean()
    torch.autograd.grad(output, inputs)
    return output.item()
