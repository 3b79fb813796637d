"""The arithmetic of each way to train, counted: the bound of any speed-up.

Counted are the floating point operations of matrix products, convolutions and attention in a job
of E epochs; causal attention counts half. Nothing is timed.

    python -m benchmarks arithmetic --output benchmarks/results/arithmetic
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.command import new_parser, note, prepare, publish
from benchmarks.sides import add_job_options, cases_of, make_sides

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

COLUMNS = {
    "model": "{model}", "workload": "{workload}", "side": "{side}",
    "TFLOP of the job": "{teraflop:.3g}", "strong's over it": "{ratio:.2f}",
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Counts, writes the files, prints the table."""
    parser = new_parser("arithmetic", __doc__, repeats=1)
    add_job_options(parser, workloads=["q1", "q2", "q5", "caption"], dtype="float32")
    parser.add_argument("--epochs", type=int, default=3, help="of a job; default: 3")
    options = parser.parse_args(arguments)
    _, content = prepare(options)
    results: list[dict[str, Any]] = []
    for model in options.models:
        for case in cases_of(options, model):
            _, sides = make_sides(case, [1])
            counts = []
            for side in sides:
                once = _count(side.encode) if side.encode else 0
                counts.append(once + options.epochs * _count(side.epoch))
                names = {"model": model, "workload": case.workload, "side": side.name}
                found = {"operations": counts[-1], "share": counts[-1] / counts[0]}
                shown = {"teraflop": counts[-1] / 1e12, "ratio": counts[0] / counts[-1]}
                results.append({**names, **found, **shown})
                side.built.tuned.zero_grad()
            note(f"{model}, {case.workload}: done")
    publish(options, content, COLUMNS, results)


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
    # The scores are computed again, and there is a product for each of four gradients.
    return 5 * _attention(query, key, value) // (4 if is_causal else 2)


def _grouped(rows: Sequence[int], weights: Sequence[int], *_args: Any, **_: Any) -> int:
    """Each row is multiplied by the weights of one group."""
    return 2 * prod(rows) * weights[-1]


def _added(_to: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    """A batch of products that is added to what is there."""
    return 2 * prod(left) * right[-1]


# Operations that torch's counter does not know.
FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    torch.ops.aten._grouped_mm: _grouped,
    torch.ops.aten.baddbmm_: _added,
}
