"""The summary of scores: as JSON values, and as a table of at most 80 columns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlft.errors import shown
from vlft.evaluation.scores import scores_path
from vlft.evaluation.statistics import (
    CONFIDENCE,
    RESAMPLES,
    interval,
    paired_p_value,
    resample_sums,
    weighted_mean,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlft.evaluation.scores import Scores

# As wide as the longest name, relaxed-accuracy.
ROW_OF_ONE = "{:<16}  {:>7}  {:>16}"
ROW_OF_TWO = "{:<16}  {:>7}  {:>7}  {:>10}  {:>16}  {:>9}"
ROLES = ("base", "tuned")


def summarise(
    scores: Sequence[Scores], positions: Sequence[Sequence[int]], seed: int
) -> dict[str, Any]:
    """The summary as JSON values; scores are shares, not per cent.

    Args:
        scores: of one result file or of two, the base first.
        positions: M of each file's answers, in order: those at the same place are a pair.
        seed: of the resamples.
    """
    return {
        "results": [
            {
                "path": str(one.of.path),
                "scores": str(scores_path(one.of.path)),
                "records": len(one.of.answers),
                "unlabelled": one.of.unlabelled,
                "unpaired": len(one.of.answers) - len(chosen),
            }
            for one, chosen in zip(scores, positions, strict=True)
        ],
        "records": len(positions[0]),
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": seed,
        "metrics": {name: _metric(name, scores, positions, seed) for name in scores[0].values},
    }


def _metric(
    name: str, scores: Sequence[Scores], positions: Sequence[Sequence[int]], seed: int
) -> dict[str, Any]:
    """Mean and interval of each file, and the difference of two with its interval and p-value."""
    chosen = [np.asarray(places) for places in positions]
    pairs = zip(scores, chosen, strict=True)
    tables = [(one.values[name][at], one.weights[name][at]) for one, at in pairs]
    columns = [column for values, weights in tables for column in (values * weights, weights)]
    sums = resample_sums(np.stack(columns, axis=1), seed)
    metric = scores[0].metrics[name]
    means = [
        metric.final(sums[:, 2 * index] / sums[:, 2 * index + 1]) for index in range(len(tables))
    ]
    averages = [float(metric.final(weighted_mean(*table))) for table in tables]
    found: dict[str, Any] = {
        "higher_is_better": metric.higher_is_better,
        **({"exponential": True} if metric.exponential else {}),
        "scores": [
            {"mean": average, "interval": interval(mean)}
            for average, mean in zip(averages, means, strict=True)
        ],
    }
    if len(tables) > 1:
        # Their mean is the difference of the weighted means.
        shares = [values * weights / weights.mean() for values, weights in tables]
        found["difference"] = {
            "mean": averages[1] - averages[0],
            "interval": interval(means[1] - means[0]),
            "p": paired_p_value(shares[1] - shares[0], seed),
        }
    return found


def lines_of(summary: Mapping[str, Any]) -> list[str]:
    """The summary as a table, with scores in per cent."""
    results, metrics = summary["results"], summary["metrics"]
    two = len(results) > 1
    lines = [line for index in range(len(results)) for line in _file_lines(results, index)]
    percent = f"{summary['confidence']:.0%} interval"
    heads = ("metric", *ROLES, "difference", percent, "p") if two else ("metric", "score", percent)
    row = ROW_OF_TWO if two else ROW_OF_ONE
    lines += ["", row.format(*heads)]
    lines += [row.format(name, *_cells(metrics[name])) for name in metrics]
    lower = [name for name in metrics if not metrics[name]["higher_is_better"]]
    lines += [f"lower is better: {', '.join(lower)}"] if lower else []
    count = f"{summary['records']:,} {'pairs' if two else 'records'}"
    plain = [name for name in metrics if metrics[name].get("exponential")]
    but = f"all but {' and '.join([*plain, *['p'] * two])} " if plain or two else ""
    return [*lines, f"{count}; {but}in per cent"]


def _file_lines(results: Sequence[Mapping[str, Any]], index: int) -> list[str]:
    """What a file is, and which of its lines do not count."""
    one = results[index]
    role = f"{ROLES[index]}: " if len(results) > 1 else ""
    lines = [f"{role}{shown(one['path'])}", f"  scores of each record: {Path(one['scores']).name}"]
    counts = {
        "without a reference": one["unlabelled"],
        "of records that the other file lacks": one["unpaired"],
    }
    for why, count in counts.items():
        if count:
            lines.append(f"  left out: {count:,} {'line' if count == 1 else 'lines'} {why}")
    return lines


def _cells(metric: Mapping[str, Any]) -> list[str]:
    scale = 1 if metric.get("exponential") else 100
    means = [f"{scale * one['mean']:.1f}" for one in metric["scores"]]
    if "difference" not in metric:
        return [*means, _range(metric["scores"][0]["interval"], "", scale)]
    difference = metric["difference"]
    change = f"{scale * difference['mean']:+.1f}"
    return [*means, change, _range(difference["interval"], "+", scale), _p(difference["p"])]


def _range(bounds: Sequence[float], sign: str, scale: int) -> str:
    return " to ".join(format(scale * bound, f"{sign}.1f") for bound in bounds)


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
