"""Charts of arms beside each other, as SVG: dots with whiskers, and curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from raphael.evaluate.report.figures import NUM_EXPERT_COLOURS, short

CurvePoint = tuple[float, float, float]  # x, mean, standard error


def dots(metrics: dict[str, Any], arms: Sequence[str], width: int = 960) -> str:
    """A group of rows a metric, a dot an arm, whiskers of two standard errors. All values are shares."""
    row_px, gap, left, right = 15, 20, 150, 30
    height = len(metrics) * (row_px * len(arms) + gap) + 26
    span = width - left - right
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="accuracies by arm">']
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = left + span * share
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 26}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{share:.0%}</text>')
    top = 8.0
    for metric in metrics.values():
        middle = top + row_px * len(arms) / 2
        label = escape(metric["label"])
        parts.append(f'<text class="name" x="{left - 16}" y="{middle + 4:.1f}" text-anchor="end">{label}</text>')
        for index, arm in enumerate(arms):
            row, y = metric["arms"][arm], top + row_px * (index + 0.5)
            x, reach = left + span * row["mean"], 2 * span * (row["error"] if math.isfinite(row["error"]) else 0)
            colour = index % NUM_EXPERT_COLOURS
            parts.append(
                f'<line class="c{colour}" stroke-width="2" x1="{x - reach:.1f}" x2="{x + reach:.1f}" '
                f'y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            said = f"{arm}: {row['mean']:.1%} +- {row['error']:.1%}"
            parts.append(f'<circle class="f{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{said}</title></circle>')
        top += row_px * len(arms) + gap
    return "".join(parts) + "</svg>"


def bands(series: dict[str, list[CurvePoint]], axis: str, width: int = 960, height: int = 300) -> str:
    """Curves with whiskers of two standard errors. series: name -> [(x, mean, standard error)]."""
    points = [point for line in series.values() for point in line]
    low = min(mean - 2 * _finite(error) for _, mean, error in points)
    high = max(mean + 2 * _finite(error) for _, mean, error in points)
    first, last = min(x for x, _, _ in points), max(x for x, _, _ in points)
    pad = 0.05 * (high - low or 1.0)
    low, high = low - pad, high + pad
    left, right, top, bottom = 60, 14, 10, 40

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first or 1.0)
        return left + (width - left - right) * across, top + (height - top - bottom) * (high - y) / (high - low)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(", ".join(series))}">']
    for share in (0, 0.25, 0.5, 0.75, 1):
        value, x = low + (high - low) * share, first + (last - first) * share
        y = place(first, value)[1]
        parts.append(f'<line class="rule" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 3.5:.1f}" text-anchor="end">{value:.3g}</text>')
        parts.append(
            f'<text class="tick" x="{place(x, low)[0]:.1f}" y="{height - 20}" text-anchor="middle">{short(x)}</text>'
        )
    parts.append(f'<text class="tick" x="{width - right}" y="{height - 4}" text-anchor="end">{escape(axis)}</text>')
    for index, line in enumerate(series.values()):
        colour, shift = index % NUM_EXPERT_COLOURS, 1.6 * (index - len(series) / 2)  # whiskers beside each other
        path = " ".join(f"{x:.1f} {y:.1f}" for x, y in (place(x, mean) for x, mean, _ in line))
        parts.append(f'<polyline class="curve c{colour}" points="{path}"/>')
        for x, mean, error in line:
            (px, lower), (_, upper) = place(x, mean - 2 * _finite(error)), place(x, mean + 2 * _finite(error))
            parts.append(
                f'<line class="c{colour}" stroke-width="1.2" opacity=".6" x1="{px + shift:.1f}" x2="{px + shift:.1f}" '
                f'y1="{lower:.1f}" y2="{upper:.1f}"/>'
            )
    return "".join(parts) + "</svg>"


def _finite(error: float) -> float:
    return error if math.isfinite(error) else 0.0
