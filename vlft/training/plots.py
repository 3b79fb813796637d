"""Curves of a run as PNG files, from its metrics.jsonl."""

from __future__ import annotations

import functools
import json
import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    Points = list[tuple[float, float]]

METRICS = "metrics.jsonl"
# The most points that are drawn of a curve; a figure is 768 pixels wide.
POINTS = 1000

# File name -> label of the y axis, curves.
FIGURES = {
    "loss": ("loss, nats per token", ("loss", "smoothed", "val_loss", "best")),
    "train_loss": ("training loss, nats per token", ("loss", "smoothed")),
    "val_loss": ("validation loss, nats per token", ("val_loss", "best")),
    "val_score": ("score of validation answers", ("val_score", "best_score")),
    "learning_rate": ("learning rate", ("learning_rate",)),
    "grad_norm": ("gradient norm before clipping", ("grad_norm",)),
}
STYLES: dict[str, dict[str, Any]] = {
    "loss": {"label": "training", "color": "C0", "alpha": 0.35, "linewidth": 1},
    "smoothed": {"label": "training, smoothed", "color": "C0"},
    "val_loss": {"label": "validation", "color": "C1"},
    "best": {"label": "best validation", "color": "C3", "ls": "", "markersize": 12},
    "val_score": {"label": "validation", "color": "C1"},
    "best_score": {"label": "best", "color": "C3", "ls": "", "markersize": 12},
    "learning_rate": {"color": "C0"},
    "grad_norm": {"color": "C0"},
}
# Curves that only the HTML report shows; no PNG file is drawn of them.
RATES = {"packed_tokens_per_second": "tokens per second", "memory_gib": "peak memory, GiB"}


def parse_metrics(line: bytes) -> dict[str, float] | None:
    """The numbers of a line by name, ``step`` among them; None if the line is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(type(value) in (int, float) for value in row.values()):
        return None
    return row if isinstance(row.get("step"), int) else None


def plot_run(run: Path) -> list[Path]:
    """Writes images/<figure>.png for every figure that has points; returns the files."""
    curves = read_curves(run / METRICS)
    (run / "images").mkdir(exist_ok=True)
    figures = _figures(run)
    return [path for name in FIGURES if (path := figures[name].save(curves)) is not None]


class _Figure:
    """A figure that is drawn anew at every save, with new data in the same artists."""

    def __init__(self, path: Path, label: str, names: tuple[str, ...]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self._path = path
        self._figure = Figure(figsize=(6.4, 3.6), dpi=120)
        # Fixed margins: matplotlib's layout engines draw twice.
        self._figure.subplots_adjust(left=0.14, right=0.98, bottom=0.13, top=0.92)
        FigureCanvasAgg(self._figure)
        self._axes = self._figure.add_subplot(xlabel="step", ylabel=label)
        self._axes.grid(alpha=0.3)
        self._names = names
        self._lines: dict[str, Any] = {}

    def save(self, curves: dict[str, Points]) -> Path | None:
        """Writes the file; None if there are no points."""
        drawn = [name for name in self._names if curves[name]]
        if not drawn:
            return None
        added = [name for name in drawn if name not in self._lines]
        for name in drawn:
            if name in added:
                (self._lines[name],) = self._axes.plot([], [], **STYLES[name])
            self._lines[name].set_data(*zip(*curves[name], strict=True))
            few = len(curves[name]) < 40
            self._lines[name].set_marker("*" if name.startswith("best") else "." if few else "")
        if any("label" in STYLES[name] for name in added):
            # Only now, as it takes the markers too.
            self._axes.legend()
        for name, what in (("best", "validation loss"), ("best_score", "score")):
            if name in drawn:
                step, value = curves[name][0]
                self._axes.set_title(f"best {what} {value:.4f}, step {step:.0f}", size="medium")
        self._axes.relim()
        self._axes.autoscale_view()
        self._figure.savefig(self._path)
        return self._path


@functools.lru_cache(maxsize=1)
def _figures(run: Path) -> dict[str, _Figure]:
    """The figures of a run, kept, as new ones at each save would leave cyclic garbage."""
    return {
        name: _Figure(run / "images" / f"{name}.png", label, names)
        for name, (label, names) in FIGURES.items()
    }


def read_curves(metrics: Path) -> dict[str, Points]:
    """At most POINTS points (step, value) per curve; only a sample of a long file is parsed."""
    curves: dict[str, Points] = {name: [] for name in (*STYLES, *RATES)}
    # A run that is stopped early saves before it has logged a step.
    if not metrics.exists():
        return curves
    with metrics.open("rb") as file:
        lines = sum(1 for _ in file)
    stride = lines // POINTS + 1
    with metrics.open("rb") as file:
        for number, line in enumerate(file):
            if (lines - 1 - number) % stride and b'"val_loss"' not in line:
                continue
            row = parse_metrics(line) or {}
            if row.get("val_best"):
                row["best_score"] = row.get("val_score", math.nan)
            for name in curves.keys() & row.keys():
                # A damaged file may hold whole numbers of any length.
                with suppress(OverflowError):
                    curves[name].append((float(row["step"]), float(row[name])))
    finite = [point for point in curves["val_loss"] if math.isfinite(point[1])]
    curves["best"] = [min(finite, key=lambda point: point[1])] if finite else []
    # The last of those that were the best so far.
    curves["best_score"] = curves["best_score"][-1:]
    curves["val_loss"] = curves["val_loss"][:: len(curves["val_loss"]) // POINTS + 1]
    curves["smoothed"] = _smooth(curves["loss"])
    return curves


def _smooth(points: Points) -> Points:
    """Exponential moving average over a twentieth of the curve, without bias at its start."""
    decay = 1 - 1 / max(1.0, len(points) / 20)
    total = weight = 0.0
    smooth = []
    for step, value in points:
        total, weight = decay * total + value, decay * weight + 1
        smooth.append((step, total / weight))
    return smooth
