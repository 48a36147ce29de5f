"""The data card's page: the template of raphael/evaluate/report/templates, and histograms as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from raphael.evaluate.report.figures import short
from raphael.evaluate.report.page import TEMPLATES
from raphael.evaluate.report.pages import page_environment

NAMES = {
    "similarity": "caption and image alike (CLIP cosine)",
    "unsafe": "unsafe",
    "watermark": "watermark",
    "aesthetic": "aesthetic (LAION V2)",
    "short_side_px": "short side, px",
    "width_over_height": "width over height",
}


def render(card: dict[str, Any], sides: dict[str, Any]) -> str:
    """Complete in itself, texts escaped. card: data_card.json; sides: of dropped.judged."""
    environment = page_environment(TEMPLATES)
    charts = []
    for name, score in card["scores"].items():
        limit = score.get("min", score.get("max"))
        svg = histogram(score["edges"], score["links"], score["kept"], limit, NAMES[name])
        charts.append(
            {"label": NAMES[name], "svg": svg, "none": score["none"], "limit": limit, "least": "min" in score}
        )
    sizes = [
        {"label": NAMES[name], "svg": histogram(part["edges"], part["kept"], part["kept"], None, NAMES[name])}
        for name, part in card["sizes"].items()
    ]
    return environment.get_template("data_card.html").render(
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"), card=card, sides=sides, charts=charts, sizes=sizes
    )


def histogram(
    edges: Sequence[float], everything: Sequence[int], kept: Sequence[int], limit: float | None, name: str
) -> str:
    """All in the pale colour, kept ones over it, a stroke at the threshold. n + 1 edges, n counts each."""
    width, height, left, right, top, bottom = 420, 190, 44, 10, 10, 26
    high, span = max(1, *everything, *kept), width - left - right
    low, last = edges[0], edges[-1]

    def x(value: float) -> float:
        return left + span * (value - low) / (last - low)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}">']
    for share in (0, 0.5, 1):
        y = top + (height - top - bottom) * (1 - share)
        parts.append(f'<line class="rule" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{left - 8}" y="{y + 3.5:.1f}" text-anchor="end">{short(high * share)}</text>'
        )
    for place, (of_all, of_kept) in enumerate(zip(everything, kept, strict=True)):
        start, step = x(edges[place]), span / len(everything)
        said = f"{edges[place]:.3g} to {edges[place + 1]:.3g}: {of_all:,}, kept {of_kept:,}"
        for count, opacity in ((of_all, 0.25), (of_kept, 1.0)):
            tall = (height - top - bottom) * count / high
            parts.append(
                f'<rect fill="var(--accent)" opacity="{opacity}" x="{start:.1f}" y="{height - bottom - tall:.1f}" '
                f'width="{max(step - 1, 0.5):.1f}" height="{tall:.1f}"><title>{said}</title></rect>'
            )
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        value = low + (last - low) * share
        parts.append(
            f'<text class="tick" x="{x(value):.1f}" y="{height - 8}" text-anchor="{anchor}">{value:.3g}</text>'
        )
    if limit is not None and low <= limit <= last:
        at = x(limit)
        parts.append(f'<line stroke="var(--ink)" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{height - bottom}"/>')
    return "".join(parts) + "</svg>"
