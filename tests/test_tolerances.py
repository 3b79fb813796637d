"""The comparison that all tests of numbers use."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from tolerances import KINDS, Kind, assert_close, assert_within, difference, print_table

ROUNDING = 0.5 * KINDS["logits"].bound
ONES = torch.ones(4)


@pytest.mark.parametrize(
    ("actual", "expected", "found"),
    [
        (ONES, ONES, (0.0, "")),
        (torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]), (0.8, "")),
        (2.0, 4.0, (0.5, "")),
        ([1.0, 2.0, 3.0], [1.0, 4.0, 3.0], (0.5, "[1]")),
        ({"a": [1.0], "b": (ONES, 3 * ONES)}, {"a": [1.0], "b": (ONES, ONES)}, (2.0, "[b][1]")),
        (0.0, 0.0, (0.0, "")),
        (1e-30, 0.0, (math.inf, "")),
    ],
)
def test_it_is_relative_and_names_the_entry(actual, expected, found):
    assert difference(actual, expected) == found


def test_float32_is_compared_in_float64():
    """A norm in float32 would lose the difference, or add one of its own."""
    expected = torch.full((100_000,), 0.1)
    actual = expected.clone()
    actual[0] += 1e-6
    assert difference(actual, expected)[0] == pytest.approx(1e-6 / 0.1 / 100_000**0.5, rel=0.01)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (ONES * (1 + 3 * ROUNDING), ONES),
        (ONES * math.nan, ONES),
        ([1.0, math.nan, 1.0], [1.0, 1.0, 1.0]),
        (torch.ones(2, 2), ONES),
        (ONES.double(), ONES),
        ([1.0], [1.0, 1.0]),
        ({"a": 1.0}, {"a": 1.0, "b": 1.0}),
        ({}, {}),
    ],
)
def test_what_is_not_close_fails(actual, expected):
    assert_close(ONES * (1 + ROUNDING), ONES, "logits")
    with pytest.raises(AssertionError):
        assert_close(actual, expected, "logits")


def test_differences_are_written_and_summed_up(tmp_path, monkeypatch, capsys):
    file = tmp_path / "differences.tsv"
    monkeypatch.setenv("VLFT_DIFFERENCES", str(file))
    assert_close([1.0, 1.0 + 1e-7], [1.0, 1.0], "loss")
    assert_close(1.0, 1.0, "loss")
    with pytest.raises(AssertionError, match=r"logits differ by 1\.0e\+00, the bound is"):
        assert_within(1.0, "logits")
    test = "tests/test_tolerances.py::test_differences_are_written_and_summed_up"
    assert file.read_text().splitlines() == [
        f"loss\t1.00e-07\t{test}[1]",
        f"loss\t0.00e+00\t{test}",
        f"logits\t1.00e+00\t{test}",
    ]
    print_table([str(file), str(file)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["logits", "2", "1.0e+00", f"{KINDS['logits'].bound:.1e}", test],
        ["loss", "4", "1.0e-07", f"{KINDS['loss'].bound:.1e}", f"{test}[1]"],
    ]


@pytest.mark.parametrize(
    ("largest", "bound"), [(0.0, 1e-6), (3e-7, 1e-6), (4e-7, 1.2e-6), (4.1e-6, 1.3e-5), (0.1, 0.3)]
)
def test_a_bound_is_three_times_the_largest_difference(largest, bound):
    assert Kind(largest, "").bound == pytest.approx(bound, rel=1e-9)


def test_float32_is_never_compared_loosely():
    """Only numbers that are rounded to 4 or 8 bits on the way may differ visibly."""
    assert all(kind.bound < 1e-3 for name, kind in KINDS.items() if name not in ("nf4", "int8"))


def test_contributing_has_the_table():
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| ([a-z0-9 ]+) \| ([0-9.e-]+) \| ([0-9.e-]+) \|", text, re.M)
    assert rows == [(name, f"{k.largest:.1e}", f"{k.bound:.1e}") for name, k in KINDS.items()]
