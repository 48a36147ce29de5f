"""The report's sections on how numbers were measured, on failures, and on what lies beside: a sweep, a data card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raphael.base.stage import read_json
from raphael.evaluate.report import figures
from raphael.evaluate.report.sections import ATTRIBUTE_LABELS, asked_and_read, load, measures
from raphael.evaluate.report.sweep_figures import of_the_model

SHOWN = 6  # of the best, and of the worst
DATA_CARD = "data_card.html"  # reports/: of `raphael data card`


def metric_cards(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """`measures`, each with its number of images, its interval, and how it was measured, in words."""
    rows = measures(measured)
    for row in rows:
        key = row["key"]
        row["n"] = measured["total"]
        row["interval"] = [f"{end:.4g}" for end in measured.get(f"{key}_interval") or ()]
        row["protocol"] = protocol_line(measured, measured.get(f"{key}_reference"))
    return rows


def protocol_line(measured: dict[str, Any], reference: str | None) -> str:
    """What a number means nothing without: prompts, sampling, weights, judge, reference."""
    settings, told = measured.get("settings", {}), measured.get("protocol", {})
    parts = [told["identity"]] if told else []
    if "prompts" in measured:
        parts.append(f"prompts {measured['prompts'][:8]}")
    for name in ("sampler", "steps", "guidance_scale", "seed"):
        if name in settings:
            parts.append(f"{name.removesuffix('_scale')} {settings[name]}")
    parts += [f"model {str(measured['model'])[:8]}"] if measured.get("model") else []
    parts += [f"CLIP {measured['scorer'][:8]}"] if measured.get("scorer") else []
    parts += [f"against {reference}"] if reference else []
    return ", ".join(parts)


def clip_by_suite(measured: dict[str, Any]) -> dict[str, Any] | None:
    """The CLIP score of every suite of prompts, as a chart with intervals; None where none was measured."""
    key = next((name for name in measured if name.endswith("_by_suite") and name.startswith("clip_score")), None)
    if key is None or len(measured[key]) < 2:
        return None
    rows = [{"name": suite or "all", **row} for suite, row in measured[key].items()]
    return {"key": key.removesuffix("_by_suite"), "rows": rows}


def failures(measured: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """Images worth looking at, with what is wrong about them; None where the evaluation named none."""
    found = measured.get("failures", {})

    def cards(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        shown = []
        for row in rows:
            wrong = [ATTRIBUTE_LABELS[name] for name in row.get("wrong", ())]
            note = f"{row['value']:.3f}" if "value" in row else ""
            uri = figures.data_uri(load(folder / row["file"]))
            shown.append({"prompt": row["prompt"], "uri": uri, "note": note, "wrong": wrong})
        return shown

    result = {"lowest": cards(found.get("lowest_clip_score", [])), "most_wrong": cards(found.get("most_wrong", []))}
    counts = [{"label": ATTRIBUTE_LABELS[name], "count": count} for name, count in found.get("wrong", {}).items()]
    return {**result, "counts": counts} if result["lowest"] or result["most_wrong"] else None


def opening(measured: dict[str, Any], folder: Path, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """{best, worst}: SHOWN images each, with what was asked and what was read; None where the evaluation named none."""
    found = measured.get("failures", {})
    listed = {entry["file"]: entry for entry in entries}
    rows = {"best": found.get("best", []), "worst": found.get("most_wrong") or found.get("lowest_clip_score", [])}

    def card(row: dict[str, Any]) -> dict[str, Any]:
        image = load(folder / row["file"])
        checks = asked_and_read(image, listed[row["file"]]) if row["file"] in listed else []
        return {"prompt": row["prompt"], "uri": figures.data_uri(image), "checks": checks}

    shown = {name: [card(row) for row in ones[:SHOWN]] for name, ones in rows.items()}
    return shown if any(shown.values()) else None


def beside(reports: Path, model: str) -> dict[str, Any]:
    """{sweep: figures of reports/sweep.json, those that are there, or None; data_card: is there one}.

    A sweep of another model than `model` (as images.json names it) is none of this report's.
    """
    file = reports / "sweep.json"
    sweep = read_json(file) if file.is_file() else None
    of_model = of_the_model(sweep) if sweep and sweep["model"] == model else None
    return {"sweep": of_model, "data_card": (reports / DATA_CARD).is_file()}
