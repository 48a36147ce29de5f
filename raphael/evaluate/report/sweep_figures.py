"""Charts of reports/sweep.json as inline SVG, for its own page and for the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from raphael.evaluate.report.figures import NUM_EXPERT_COLOURS

LEFT, RIGHT, TOP, BOTTOM = 66, 24, 16, 46


def trade_off(rows: Sequence[dict[str, Any]], score: str, distance: str, width: int = 720, height: int = 380) -> str:
    """The paper's figure: Frechet distance over CLIP score, a dot a guidance weight, its number beside it.

    rows: of one series of sweep.json. Whiskers: two standard errors both ways, where there are several seeds.
    """
    frame = Frame(
        [(row["score"]["mean"], reach(row["score"])) for row in rows],
        [(row["distance"]["mean"], reach(row["distance"])) for row in rows],
        (width, height),
    )
    parts = [frame.opening(f"{distance} over {score}"), frame.grid(score, distance)]
    places = [frame.place(row["score"]["mean"], row["distance"]["mean"]) for row in rows]
    parts.append(f'<polyline class="curve c0" points="{" ".join(f"{x:.1f} {y:.1f}" for x, y in places)}"/>')
    for row, (x, y) in zip(rows, places, strict=True):
        parts.append(frame.whisker(row["score"], row["distance"], "c0"))
        said = f"guidance {row['x']:g}: {distance} {row['distance']['mean']:.5g}, {score} {row['score']['mean']:.5g}"
        parts.append(f'<circle class="f0" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{escape(said)}</title></circle>')
    parts += [
        f'<text class="name" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{row["x"]:g}</text>'
        for row, (x, y, anchor) in zip(rows, labels(places), strict=True)
    ]
    return "".join(parts) + "</svg>"


def over_number(
    series: dict[str, Sequence[tuple[float, dict[str, Any]]]], axis: str, name: str, width: int = 720, height: int = 280
) -> str:
    """A number over a setting: a curve a series, whiskers of two standard errors. series: name -> [(x, spread)]."""
    points = [point for line in series.values() for point in line]
    frame = Frame([(x, 0.0) for x, _ in points], [(y["mean"], reach(y)) for _, y in points], (width, height))
    parts = [frame.opening(f"{name} over {axis}"), frame.grid(axis, name, [x for x, _ in points])]
    for index, (label, line) in enumerate(series.items()):
        colour = index % NUM_EXPERT_COLOURS
        places = [frame.place(x, y["mean"]) for x, y in line]
        parts.append(f'<polyline class="curve c{colour}" points="{" ".join(f"{x:.1f} {y:.1f}" for x, y in places)}"/>')
        for (x, y), (px, py) in zip(line, places, strict=True):
            parts.append(frame.whisker({"mean": x, "error": None}, y, f"c{colour}"))
            said = escape(f"{label} {axis} {x:g}: {name} {y['mean']:.5g}".strip())
            parts.append(f'<circle class="f{colour}" cx="{px:.1f}" cy="{py:.1f}" r="4"><title>{said}</title></circle>')
    return "".join(parts) + "</svg>"


def charts(results: dict[str, Any]) -> list[dict[str, Any]]:
    """sweep.json's figures for a page: {name, title, absent} or {.., n, rows, charts: [{title, svg}], series}.

    kind: "changed", of a number changed while sampling, "trained", of models trained with it, or "".
    """
    found = []
    for name, figure in results["figures"].items():
        title, axis = figure.get("title", name), figure.get("axis", name)  # sweeps of long ago gave no titles
        if "absent" in figure:
            found.append({"name": name, "title": title, "absent": figure["absent"]})
            continue
        drawn = []
        if name == "guidance":
            (rows,) = figure["series"].values()
            svg = trade_off(rows, figure["score"], figure["distance"])
            drawn.append({"title": f"{figure['distance']} over {figure['score']}", "svg": svg})
        for kind in ("distance", "score") if name != "guidance" else ():
            lines = {label: [(row["x"], row[kind]) for row in rows] for label, rows in figure["series"].items()}
            drawn.append({"title": figure[kind], "svg": over_number(lines, axis, figure[kind])})
        if "steps_per_s" in figure:
            speed = {
                label: [(x, {"mean": rate, "error": None}) for x, rate in rows]
                for label, rows in figure["steps_per_s"].items()
            }
            drawn.append({"title": "DDIM steps a second", "svg": over_number(speed, axis, "steps a second")})
        facts = {key: figure[key] for key in ("n", "n_reference", "distance", "score", "series")}
        found.append(
            {
                "name": name,
                "title": title,
                "axis": axis,
                "absent": "",
                "charts": drawn,
                "kind": figure.get("kind", ""),
                **facts,
            }
        )
    return found


def of_the_model(results: dict[str, Any]) -> dict[str, Any] | None:
    """{model, knobs, figures that have something to show}; None where none has. knobs: what it was trained with."""
    drawn = [figure for figure in charts(results) if not figure["absent"]]
    about = {"model": results["model"], "knobs": results.get("knobs", {})}
    return {**about, "figures": drawn} if drawn else None


def reach(spread: dict[str, Any]) -> float:
    """Half a whisker: two standard errors; 0 where one seed says nothing of its error."""
    return 2 * (spread["error"] or 0.0)


class Frame:
    """Axes around points with their reach. xs, ys: [(value, half a whisker)]."""

    def __init__(self, xs: Sequence[tuple[float, float]], ys: Sequence[tuple[float, float]], size: tuple[int, int]):
        self.width, self.height = size
        self.x_low, self.x_high = _span(xs)
        self.y_low, self.y_high = _span(ys)

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x_low) / (self.x_high - self.x_low)
        down = (self.y_high - y) / (self.y_high - self.y_low)
        return LEFT + (self.width - LEFT - RIGHT) * across, TOP + (self.height - TOP - BOTTOM) * down

    def opening(self, label: str) -> str:
        return f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label)}">'

    def grid(self, x_name: str, y_name: str, x_ticks: Sequence[float] | None = None) -> str:
        """Rules at round numbers, and the axes' names. x_ticks: at these instead, the values that were tried."""
        parts = []
        for value in ticks(self.y_low, self.y_high):
            y = self.place(self.x_low, value)[1]
            parts.append(f'<line class="rule" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 3.5:.1f}" text-anchor="end">{value:.4g}</text>')
        base = self.height - BOTTOM
        for value in sorted(set(x_ticks)) if x_ticks is not None else ticks(self.x_low, self.x_high):
            x = self.place(value, self.y_low)[0]
            parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 18}" text-anchor="middle">{value:.4g}</text>')
        right = self.width - RIGHT
        parts.append(f'<text class="tick" x="{right}" y="{self.height - 6}" text-anchor="end">{escape(x_name)}</text>')
        parts.append(f'<text class="tick" x="{LEFT + 6}" y="{TOP - 4}">{escape(y_name)}</text>')
        return "".join(parts)

    def whisker(self, x: dict[str, Any], y: dict[str, Any], style: str) -> str:
        lines = []
        for across, up in ((reach(x), 0.0), (0.0, reach(y))):
            if across or up:
                x1, y1 = self.place(x["mean"] - across, y["mean"] - up)
                x2, y2 = self.place(x["mean"] + across, y["mean"] + up)
                at = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
                lines.append(f'<line class="{style}" stroke-width="1.4" opacity=".6" {at}/>')
        return "".join(lines)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between low and high: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    return [round(index * step, 12) for index in range(first, math.floor(high / step) + 1)]


def labels(places: Sequence[tuple[float, float]]) -> list[tuple[float, float, str]]:
    """Where a dot's number goes: on the side that its neighbours on the curve leave free. (x, y, text-anchor)."""
    found = []
    for index, (x, y) in enumerate(places):
        near = [places[i] for i in (index - 1, index + 1) if 0 <= i < len(places)]
        toward = [(nx - x, ny - y) for nx, ny in near]
        lengths = [math.hypot(*step) or 1.0 for step in toward]
        away = [-sum(step[axis] / length for step, length in zip(toward, lengths)) for axis in (0, 1)]
        length = math.hypot(*away)
        dx, dy = (away[0] / length, away[1] / length) if length > 0.05 else _across(toward)
        anchor = "start" if dx > 0.4 else "end" if dx < -0.4 else "middle"
        found.append((x + 12 * dx, y + 14 * dy + 4.5, anchor))
    return found


def _across(toward: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """A unit step at a right angle to a straight piece of the curve; up for a single dot."""
    if not toward or not math.hypot(*toward[0]):
        return 0.0, -1.0
    dx, dy = toward[0]
    length = math.hypot(dx, dy)
    return (dy / length, -dx / length) if dx > 0 else (-dy / length, dx / length)


def _span(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    low, high = min(value - by for value, by in values), max(value + by for value, by in values)
    pad = 0.08 * (high - low or abs(high) or 1.0)
    return low - pad, high + pad
