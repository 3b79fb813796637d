"""How far apart two computations of the same numbers may be, by kind of comparison.

The bound of a kind is three times the largest difference that rounding alone has caused under any
tested setting of the CPU, so that a test fails because of a mistake and not because of a machine.
CONTRIBUTING.md says how they were measured: with ``VLFT_DIFFERENCES=FILE`` in the environment each
comparison adds a line to that file, and ``python tests/tolerances.py FILE...`` sums such files up.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest
import torch

from vlft.checkpoints.quantize import int8_overflows

Numbers: TypeAlias = "torch.Tensor | float | Sequence[Numbers] | Mapping[str, Numbers]"


@dataclass(frozen=True)
class Kind:
    """A kind of comparison.

    Attributes:
        largest: the largest difference seen.
        reason: why the numbers are not equal bit by bit.
        least: the bound where ``largest`` is smaller by luck; 8 roundings of float32.
    """

    largest: float
    reason: str
    least: float = 1e-6

    @property
    def bound(self) -> float:
        """Three times the largest difference, rounded up to two digits."""
        if 3 * self.largest <= self.least:
            return self.least
        digits = 1 - math.floor(math.log10(3 * self.largest))
        return math.ceil(round(3 * self.largest * 10**digits, 6)) / 10**digits


KINDS = {
    "golden features": Kind(
        4.3e-6, "The authors' code ran on another CPU, with all heads of a layer at once."
    ),
    "golden logits": Kind(
        3.3e-6, "The authors' code ran on another CPU, with another order of sums."
    ),
    "golden padded logits": Kind(
        1.2e-5, "Rows behind 900 tokens of padding have other rotary angles; of DeepSeek-OCR."
    ),
    "golden loss": Kind(2.0e-7, "The mean over the tokens of such logits; their errors cancel."),
    "golden gradients": Kind(4.4e-5, "The backward pass rounds once more for each operation."),
    "golden scalars": Kind(
        4.6e-5, "The gradient of a scalar is a sum of many values that nearly cancel."
    ),
    "logits": Kind(
        1.1e-6, "The same weights with another attention, another order of experts or peft's LoRA."
    ),
    "merged logits": Kind(4.9e-6, "Weights that have the adapter added are rounded once more."),
    "split base": Kind(
        1.7e-6, "pissa, olora and orthogonal take the adapter's start out of rounded weights."
    ),
    "loss": Kind(
        2.3e-7, "Packed or alone, in chunks or at once, tokens are added in another order."
    ),
    "gradients": Kind(
        7.4e-6, "Packed or alone, the contributions of samples are added in another order."
    ),
    "layer": Kind(
        6.1e-7, "One layer computed by another formula: a loop, a dense mask, the sum of weights."
    ),
    "layer gradients": Kind(6.1e-7, "The gradients of such a layer."),
    "float64": Kind(
        3.0e-16, "One layer in double precision, which shows a mistake more clearly.", 1e-12
    ),
    "run losses": Kind(
        3.3e-5, "Rows and processes add gradients in another order before each step."
    ),
    "run gradient norms": Kind(3.3e-5, "As losses, but a gradient is a difference of large terms."),
    "run weights": Kind(
        3.3e-4,
        "Adam divides by tiny second moments, which enlarges the rounding of tiny gradients.",
    ),
    "nf4": Kind(0.17, "Not noise but the rounding of weights to 16 levels."),
    "int8": Kind(
        6.2e-2, "Inputs are rounded to 8 bits as well, where the last bit of float32 may decide."
    ),
}


def assert_close(actual: Numbers, expected: Numbers, kind: str) -> None:
    """Fails if two computations of the same numbers differ by more than the bound of their kind."""
    found, where = difference(actual, expected)
    assert_within(found, kind, where)


def assert_within(found: float, kind: str, where: str = "") -> None:
    """Fails if a difference is larger than the bound of its kind, or is not a number."""
    file = os.environ.get("VLFT_DIFFERENCES")
    if file:
        test = os.environ["PYTEST_CURRENT_TEST"].removesuffix(" (call)")
        with Path(file).open("a", encoding="utf-8") as lines:
            lines.write(f"{kind}\t{found:.2e}\t{test}{where}\n")
    if kind == "int8" and int8_overflows():
        pytest.skip("this CPU adds products of 8 bits in 16, which overflow")
    bound = KINDS[kind].bound
    assert found <= bound, f"{kind} differ by {found:.1e}{where}, the bound is {bound:.1e}"


def difference(actual: Numbers, expected: Numbers) -> tuple[float, str]:
    """The relative difference of two values, and the entry of a list or table that it is of.

    Of tensors and numbers it is the Euclidean norm of ``actual - expected`` divided by that of
    ``expected``; of lists and tables the largest of an entry. A norm over all elements, because
    the largest single difference varies more from machine to machine.
    """
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys()
        entries = {f"[{name}]": (actual[name], expected[name]) for name in expected}
    elif isinstance(expected, Sequence):
        assert len(actual) == len(expected)
        pairs = zip(actual, expected, strict=True)
        entries = {f"[{index}]": pair for index, pair in enumerate(pairs)}
    else:
        return _relative(_tensor(actual), _tensor(expected)), ""
    assert entries, "there is nothing to compare"
    found = {name: difference(*pair) for name, pair in entries.items()}
    # A difference that is not a number counts as the largest.
    name = max(found, key=lambda name: (math.isnan(found[name][0]), found[name][0]))
    return found[name][0], name + found[name][1]


def _tensor(value: torch.Tensor | float) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach()
    return torch.tensor(value, dtype=torch.float64)


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    if torch.equal(actual, expected):
        return 0.0
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def print_table(files: list[str]) -> None:
    """Prints kind, number of comparisons, largest difference, bound and test of the largest."""
    rows: dict[str, list[tuple[float, str]]] = {}
    for file in files:
        for line in Path(file).read_text("utf-8").splitlines():
            kind, found, test = line.split("\t")
            rows.setdefault(kind, []).append((float(found), test))
    for kind in KINDS:
        if kind in rows:
            largest, test = max(rows[kind])
            print(f"{kind:<20}{len(rows[kind]):>7}{largest:>9.1e}{KINDS[kind].bound:>9.1e}  {test}")


if __name__ == "__main__":
    print_table(sys.argv[1:])
