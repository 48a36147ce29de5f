"""The report's figures as inline SVG and data URIs: text in, text out, the same bytes for the same numbers.

Colours come from the page's custom properties (report.css), so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

HEAT = np.array([[18, 16, 22], [70, 28, 60], [168, 54, 46], [232, 132, 48], [255, 226, 150]], dtype=np.float64)
NUM_EXPERT_COLOURS = 8  # --expert-0 ... in report.css


def data_uri(pixels: np.ndarray, max_side_px: int = 256) -> str:
    """uint8 (H, W, 3) or (H, W) as a data URI: PNG up to 128 px, larger ones as JPEG of at most max_side_px."""
    from PIL import Image

    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    if max(image.size) <= 128:
        image.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
        image.convert("RGB").save(buffer, format="JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def heat_overlay(pixels: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """A word's attention (h, w), 0..1, laid over the dimmed image uint8 (H, W, 3) -> uint8 (H, W, 3)."""
    from PIL import Image

    height, width = pixels.shape[:2]
    heat = Image.fromarray(np.uint8(np.clip(attention, 0, 1) * 255)).resize((width, height), Image.Resampling.BICUBIC)
    heat = np.asarray(heat, np.float64) / 255
    place = heat * (len(HEAT) - 1)
    low = np.clip(place.astype(int), 0, len(HEAT) - 2)
    colour = HEAT[low] + (place - low)[..., None] * (HEAT[low + 1] - HEAT[low])
    grey = pixels.astype(np.float64).mean(-1, keepdims=True) * 0.55
    weight = (0.25 + 0.65 * heat)[..., None]
    return np.uint8(np.clip(grey * (1 - weight) + colour * weight, 0, 255).round())


def line_chart(
    series: dict[str, list[tuple[float, float]]],
    width: int = 640,
    height: int = 220,
    span: tuple[float, float] | None = None,
) -> str:
    """Curves over images seen, log scale where values span over a decade. series: name -> [(images, value)]; span: of
    the values that are shown, where it is known; the middle rule is then its middle."""
    points = [point for line in series.values() for point in line if math.isfinite(point[1])]
    if not points:
        return ""
    x_max = max(x for x, _ in points) or 1.0
    values = [y for _, y in points]
    log = min(values) > 0 and max(values) / min(values) > 10
    scale = math.log10 if log else float
    low, high = scale(min(values)), scale(max(values))
    if span:
        log, scale, (low, high) = False, float, span
    elif not log:
        low = min(low, 0.0) if low < 0.25 * high else low
    pad = (high - low or abs(high) or 1.0) * 0.06
    low, high = low - pad, high + pad
    left, right, top, bottom = 54, 12, 10, 28

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (width - left - right) * x / x_max,
            top + (height - top - bottom) * (1 - (scale(y) - low) / (high - low)),
        )

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(", ".join(series))}">']
    for tick in np.linspace(low + pad, high - pad, 5 if span else 4):
        value = 10**tick if log else tick
        y = top + (height - top - bottom) * (1 - (tick - low) / (high - low))
        parts.append(f'<line class="rule" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 3.5:.1f}" text-anchor="end">{value:.3g}</text>')
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = left + (width - left - right) * share
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="{_anchor(share)}">'
            f"{short(x_max * share)}</text>"
        )
    for index, line in enumerate(series.values()):
        path = " ".join(
            f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}"
            for i, (x, y) in enumerate(place(*p) for p in line if math.isfinite(p[1]))
        )
        parts.append(f'<path class="curve c{index % NUM_EXPERT_COLOURS}" d="{path}"/>')
    return "".join(parts) + "</svg>"


def interval_chart(rows: Sequence[dict[str, Any]], width: int = 640) -> str:
    """A dot with its 95 % whisker per share, a tick at chance. rows: {label, value, low, high, n, chance or None}."""
    row_px, left, right = 40, 150, 118
    height = row_px * len(rows) + 30
    span = width - left - right
    parts = [f'<svg class="chart intervals" viewBox="0 0 {width} {height}" role="img" aria-label="accuracies">']
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = left + span * share
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 26}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{share:.0%}</text>')
    for index, row in enumerate(rows):
        y = row_px * index + row_px / 2 + 2
        x, low, high = (left + span * row[key] for key in ("value", "low", "high"))
        parts.append(
            f'<text class="name" x="{left - 16}" y="{y + 4.5:.1f}" text-anchor="end">{escape(row["label"])}</text>'
        )
        parts.append(f'<line class="track" x1="{left}" x2="{left + span}" y1="{y}" y2="{y}"/>')
        if row.get("chance") is not None:
            c = left + span * row["chance"]
            parts.append(f'<line class="chance" x1="{c:.1f}" x2="{c:.1f}" y1="{y - 8}" y2="{y + 8}"/>')
        parts.append(f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y}" r="5.5"/>')
        parts.append(
            f'<text class="value" x="{width - right + 18}" y="{y + 5:.1f}">{row["value"]:.1%}</text>'
            f'<text class="tick" x="{width}" y="{y + 4.5:.1f}" text-anchor="end">n {row["n"]}</text>'
        )
    return "".join(parts) + "</svg>"


def short(number: float) -> str:
    """1536000 -> 1.5M, 30720 -> 31k."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def _anchor(share: float) -> str:
    return {0: "start", 1: "end"}.get(share, "middle")
