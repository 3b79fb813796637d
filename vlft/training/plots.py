"""Curves of a run as PNG files, from its metrics.jsonl."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

CURVES = {
    "train_loss": ("loss", "training loss, nats per token"),
    "val_loss": ("val_loss", "validation loss, nats per token"),
    "learning_rate": ("learning_rate", "learning rate"),
}


def plot_run(run: Path) -> list[Path]:
    """Writes images/<curve>.png for every curve that has points; returns the files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = run / "metrics.jsonl"
    # A run that is stopped early saves before it has logged a step.
    lines = metrics.read_text("utf-8").splitlines() if metrics.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    folder = run / "images"
    folder.mkdir(exist_ok=True)
    written = []
    for name, (key, label) in CURVES.items():
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            figure = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.add_subplot(xlabel="step", ylabel=label)
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else "")
            axes.grid(alpha=0.3)
            figure.savefig(folder / f"{name}.png")
            written.append(folder / f"{name}.png")
    return written
