"""Curves -> inline SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlft.report.page import text

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 240, 52, 22, 8
TICKS = 4
COLOURS = 6


@dataclass(frozen=True)
class Curve:
    """A curve of a chart.

    Attributes:
        name: in the legend; empty for none.
        points: (step, value), ascending.
        colour: number of the style's colour.
        faint: whether it stands behind the others.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    faint: bool = False


def chart(title: str, curves: Sequence[Curve], marked: tuple[float, float] | None = None) -> str:
    """A figure with the curves; empty if no point is finite.

    Args:
        title: what the values are.
        curves: of the same steps.
        marked: a point with a circle around it.
    """
    finite = [[p for p in curve.points if math.isfinite(p[1])] for curve in curves]
    points = [point for part in finite for point in part]
    if not points:
        return ""
    axes = _Axes(points)
    body = [axes.grid()]
    for curve, part in zip(curves, finite, strict=True):
        style = f"stroke:var(--c{curve.colour % COLOURS});opacity:{0.35 if curve.faint else 1}"
        # A curve of a single point is a dot.
        line = " ".join(axes.place(point) for point in (part * 2 if len(part) == 1 else part))
        width = 4 if len(part) == 1 else 1.6
        body.append(
            f'<polyline points="{line}" fill="none" stroke-width="{width}" '
            f'stroke-linecap="round" style="{style}"/>'
        )
    if marked:
        x, y = axes.place(marked).split(",")
        body.append(f'<circle cx="{x}" cy="{y}" r="5" fill="none" style="stroke:var(--c3)"/>')
    legend = " ".join(
        f'<span style="color:var(--c{curve.colour % COLOURS})">{text(curve.name)}</span>'
        for curve in curves
        if curve.name
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}">'
        f"{''.join(body)}</svg><figcaption>{text(title)} {legend}</figcaption></figure>"
    )


class _Axes:
    """The scales of a chart, both from the least to the greatest value."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        self._low, self._high = (
            [bound(axis) for axis in zip(*points, strict=True)] for bound in (min, max)
        )
        for axis in (0, 1):
            if self._low[axis] == self._high[axis]:
                self._high[axis] += abs(self._low[axis]) or 1.0

    def place(self, point: tuple[float, float]) -> str:
        """The place of a point in the picture."""
        shares = [
            (value - low) / (high - low)
            for value, low, high in zip(point, self._low, self._high, strict=True)
        ]
        x = LEFT + shares[0] * (WIDTH - LEFT - 10)
        y = HEIGHT - BOTTOM - shares[1] * (HEIGHT - BOTTOM - TOP)
        return f"{x:.1f},{y:.1f}"

    def grid(self) -> str:
        """Lines and numbers of both axes, at round values."""
        from matplotlib.ticker import MaxNLocator

        across, up = (
            [
                float(value)
                for value in MaxNLocator(TICKS, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
                if low <= value <= high
            ]
            for low, high in zip(self._low, self._high, strict=True)
        )
        made = []
        for y in up:
            row = self.place((self._low[0], y)).split(",")[1]
            made.append(
                f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{row}" y2="{row}" '
                'style="stroke:var(--line)"/>'
                f'<text x="{LEFT - 5}" y="{row}" dy="4" text-anchor="end">{_number(y)}</text>'
            )
        for x in across:
            column = self.place((x, self._low[1])).split(",")[0]
            made.append(
                f'<text x="{column}" y="{HEIGHT - 6}" text-anchor="middle">{_number(x)}</text>'
            )
        return "".join(made)


def _number(value: float) -> str:
    """The label of a tick: ``6,500`` rather than ``6.5e+03``, which is wider than the margin."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
