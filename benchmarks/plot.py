"""Draws what `benchmarks peers` measured, each side's speed-up over the strong loop; prints rows.

Picture and rows are those of docs/performance.md.

    python -m benchmarks plot benchmarks/results/peers-cpu.json docs/images/peers.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# Title of a group of bars -> side of the result file, key of the speed-up, colour.
BARS = {
    "TRL 1.16": ("TRL", "speedup", "#b0b0b0"),
    "strong, features kept": ("strong, features kept", "speedup", "#707070"),
    "vlft, one epoch": ("vlft", "once_speedup", "#9ecae1"),
    "vlft, three epochs": ("vlft", "speedup", "#2171b5"),
}
WORKLOADS = {
    "q1": "one question\nan image", "q2": "two", "q5": "five", "caption": "captions,\n280 tokens",
    "mixed": "mixed", "text": "text\nalone",
}  # fmt: skip
TITLE = "times as fast as an expert's own loop (1.0), {dtype}"


def main(arguments: list[str]) -> None:
    """Reads result files and writes a picture, in the format that its name ends with."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args(arguments)
    comparisons = [
        one
        for path in options.results
        for one in json.loads(path.read_text("utf-8"))["comparisons"]
    ]
    draw(comparisons, options.picture)
    print(rows_of(comparisons))


def draw(comparisons: list[dict[str, Any]], picture: Path) -> None:
    """A panel for each dtype, a group of bars for each workload."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    # The same figures give the same file, and texts are texts.
    rcParams.update({"svg.hashsalt": "vlft", "svg.fonttype": "none"})
    dtypes = list(dict.fromkeys(one["dtype"] for one in comparisons))
    figure = Figure(figsize=(8, 2.8 * len(dtypes)), layout="constrained")
    for axes, dtype in zip(figure.subplots(len(dtypes), squeeze=False)[:, 0], dtypes, strict=True):
        chosen = [one for one in comparisons if one["dtype"] == dtype]
        for number, (title, (side, key, colour)) in enumerate(BARS.items()):
            places = [place + (number - 1.5) * 0.2 for place in range(len(chosen))]
            heights = [_of(one["results"], side)[key] for one in chosen]
            bars = axes.bar(places, heights, 0.2, label=title, color=colour)
            axes.bar_label(bars, fmt="%.2f", fontsize=6, padding=1)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(chosen)), [WORKLOADS[one["workload"]] for one in chosen])
        axes.set_title(TITLE.format(dtype=dtype), fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=7, frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


def rows_of(comparisons: list[dict[str, Any]]) -> str:
    """The same in Markdown, a row for each workload: the first dtype, a slash, the next."""
    names = [*BARS, "vlft's memory", "with the model"]
    lines = ["| data | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for workload in dict.fromkeys(one["workload"] for one in comparisons):
        chosen = [one["results"] for one in comparisons if one["workload"] == workload]
        cells = [[_of(one, side)[key] for one in chosen] for side, key, _ in BARS.values()]
        cells += [
            [_of(one, "vlft")[key] for one in chosen] for key in ("peak_ratio", "whole_ratio")
        ]
        shown = (" / ".join(f"{value:.2f}" for value in values) for values in cells)
        lines.append(f"| {workload} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _of(results: list[dict[str, Any]], side: str) -> dict[str, Any]:
    """The result of a side."""
    return next(result for result in results if result["side"] == side)
