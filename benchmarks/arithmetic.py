"""The arithmetic of each way to train, counted: the bound of what the times can be.

Counted are the floating point operations of matrix products, convolutions and attention in a job
of E epochs; causal attention counts half. Nothing is timed.

    python -m benchmarks arithmetic --output benchmarks/results/arithmetic
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.command import DTYPES, markdown, new_parser, note, prepare, write
from benchmarks.models import random_model
from benchmarks.samples import random_samples
from benchmarks.shapes import SCALES
from benchmarks.sides import BatchSize, all_sides
from benchmarks.workloads import WORKLOADS
from vlft.config import TOKENS_PER_ROW

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.sides import Side

TERA = 1e12


@dataclass(frozen=True)
class Result:
    """A row of the table.

    Attributes:
        model: by name.
        workload: by name.
        side: by name.
        operations: of the job.
        share: of the first side's.
    """

    model: str
    workload: str
    side: str
    operations: int
    share: float


def main(arguments: list[str]) -> None:
    """Counts, writes the files, prints the table."""
    parser = new_parser("arithmetic", __doc__, repeats=1)
    add = parser.add_argument
    add("--models", nargs="+", default=list(SCALES["middle"]), choices=list(SCALES["middle"]))
    add("--workloads", nargs="+", default=["q1", "q2", "q5", "q10"], choices=list(WORKLOADS))
    add("--scale", default="middle", choices=SCALES, help="of the models")
    add("--dtype", default="float32", choices=DTYPES, help="default: float32")
    add("--samples", type=int, default=10, help="of an optimiser step; default: 10")
    add("--epochs", type=int, default=3, help="of a job; default: 3")
    options = parser.parse_args(arguments)
    device, content = prepare(options)
    results: list[Result] = []
    for name in options.models:
        built = random_model(SCALES[options.scale][name], DTYPES[options.dtype], device)
        for workload in options.workloads:
            job = random_samples(WORKLOADS[workload], built, options.samples)
            one = BatchSize(1, max(map(len, job.samples)))
            first = 0
            for side in all_sides(built, job, one, TOKENS_PER_ROW[device.type]):
                operations = count(side, options.epochs)
                built.tuned.zero_grad()
                first = first or operations
                results.append(Result(name, workload, side.name, operations, operations / first))
            note(f"{name}, {workload}: done")
            found = {**content, "results": [asdict(result) for result in results]}
            write(options.output, found, table(results))
    print(table(results))


def count(side: Side, epochs: int) -> int:
    """Operations of encoding, where the side does that once, and of the epochs."""
    once = _count(side.encode) if side.encode else 0
    return once + epochs * _count(side.epoch)


def _count(compute: Callable[[], float]) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with counter:
        compute()
    return int(counter.get_total_flops())


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _forward(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], _dropout: float = 0.0,
    is_causal: bool = False, **_: Any,
) -> int:  # fmt: skip
    return _attention(query, key, value) // (2 if is_causal else 1)


def _backward(
    _upstream: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int],
    _out: Sequence[int], _sums: Sequence[int], _dropout: float, is_causal: bool, **_: Any,
) -> int:  # fmt: skip
    # The scores again, and a product for each of four gradients.
    return 5 * _attention(query, key, value) // (4 if is_causal else 2)


def _grouped(rows: Sequence[int], weights: Sequence[int], *_args: Any, **_: Any) -> int:
    """Each row meets the weights of one group."""
    return 2 * prod(rows) * weights[-1]


# What torch's counter does not know.
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    torch.ops.aten._grouped_mm: _grouped,
}


def table(results: Sequence[Result]) -> str:
    """The results in Markdown."""
    columns = ("model", "workload", "side", "TFLOP of the job", "plain's over it")
    rows = [
        [r.model, r.workload, r.side, f"{r.operations / TERA:.3g}", f"{1 / r.share:.2f}"]
        for r in results
    ]
    return markdown(columns, rows, words=3)
