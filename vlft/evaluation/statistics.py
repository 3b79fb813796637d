"""How sure a mean over records is: bootstrap intervals, and a paired test of two models."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 9_999
# Differences of which all signs are tried; 2**16 take less memory than the random ones.
EXACT_UP_TO = 16
# Numbers that are held at once.
CHUNK = 2_000_000
# Sums that differ by rounding alone are equal.
SLACK = 1e-9


def weighted_mean(scores: Floats, weights: Floats) -> float:
    """Sum of the weighted scores by the sum of the weights."""
    return float(scores @ weights / weights.sum())


def resample_sums(columns: Floats, seed: int) -> Floats:
    """Sums of columns over records drawn with replacement (Efron 1979).

    Args:
        columns: (N, C), a row for each record.
        seed: the same one gives the same draws.

    Returns:
        (RESAMPLES, C), the sums over N drawn rows. A resample draws the same rows for each column.
    """
    generator = np.random.default_rng(seed)
    count = len(columns)
    sums = np.empty((RESAMPLES, columns.shape[1]))
    step = max(1, CHUNK // count)
    for start in range(0, RESAMPLES, step):
        stop = min(start + step, RESAMPLES)
        drawn = generator.integers(count, size=(stop - start, count))
        times = np.stack([np.bincount(row, minlength=count) for row in drawn])
        sums[start:stop] = times @ columns
    return sums


def interval(resampled: Floats) -> tuple[float, float]:
    """The percentile interval at CONFIDENCE of a statistic's values over the resamples, (R,)."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def paired_p_value(differences: Floats, seed: int) -> float:
    """Two-sided p-value of the hypothesis that neither model is better, by flipping signs.

    If so, each record's difference is as likely to have the other sign (Fisher 1935). Exact if
    all differences are of one size, which is McNemar's exact test for scores of 0 and 1, and for
    up to EXACT_UP_TO of them; else from RESAMPLES random choices of signs, which makes
    1 / (RESAMPLES + 1) the smallest value.

    Args:
        differences: (N,), tuned minus base of each record.
        seed: of the random signs.
    """
    moved = np.abs(differences[np.abs(differences) > SLACK])
    if not len(moved):
        return 1.0
    total = abs(float(differences.sum()))
    if np.ptp(moved) <= SLACK:
        return _binomial(len(moved), round(total / float(moved.mean())))
    if len(moved) <= EXACT_UP_TO:
        choices = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1
        sums = np.abs((choices * 2 - 1) @ moved)
        return float(np.mean(sums >= total - SLACK))
    generator = np.random.default_rng(seed)
    step = max(1, CHUNK // len(moved))
    extreme = 0
    for start in range(0, RESAMPLES, step):
        size = (min(step, RESAMPLES - start), len(moved))
        signs = generator.integers(2, size=size, dtype=np.int8) * 2.0 - 1
        extreme += int(np.sum(np.abs(signs @ moved) >= total - SLACK))
    return (extreme + 1) / (RESAMPLES + 1)


def _binomial(count: int, lead: int) -> float:
    """Two-sided p-value of a lead of one sign over the other among equal differences."""
    most = (count + lead) // 2
    tail = sum(math.comb(count, k) for k in range(most, count + 1))
    return min(1.0, 2 * tail / (1 << count))
