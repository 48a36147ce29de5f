"""The report's section on why: the probe, where it fails beside its ceiling, knock-outs, the swap of texts."""

from __future__ import annotations

from typing import Any

from raphael.evaluate.instruments.probe import LABELS
from raphael.evaluate.report import figures
from raphael.evaluate.report.inside import knockouts
from raphael.evaluate.report.sections import ATTRIBUTE_LABELS
from raphael.evaluate.scenes.breakdown import PARTS

PART_LABELS = {
    "two_objects": "two objects",
    "both_shapes": "both shapes",
    "both_colours": "both colours",
    "both_pairs": "both pairs of shape and colour",
    "right_side": "right side",
    "right_side_of_both_pairs": "right side, where both pairs are",
}
MOST_READ = 4  # wrong readings that a table's row names


def why(measured: dict[str, Any]) -> dict[str, Any] | None:
    """What evaluate.json holds of the instruments, for the template; None where it holds nothing of them."""
    found = {
        "probe": _probe(measured.get("probe")),
        "ceiling": _ceiling(measured),
        "relations": _relations(measured),
        "asked": _asked(measured.get("asked_and_read") or {}),
        "knockouts": knockouts(measured.get("knockouts")),
        "swap": measured.get("swap"),
    }
    return found if any(found.values()) else None


def _probe(probe: dict[str, Any] | None) -> dict[str, Any] | None:
    if not probe:
        return None
    rows = []
    for name, row in probe["facts"].items():
        value, low, high, n = (row[f"win_share{end}"] for end in ("", "_low", "_high", "_n"))
        rows.append({"label": LABELS[name], "value": value, "low": low, "high": high, "n": n, "chance": 0.5})
    return {"svg": figures.interval_chart(rows), "version": probe["version"], "times": probe["times"]}


def _ceiling(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """A row an attribute: the model's share, and those of drawn and of decoded true images."""
    reached = measured.get("ceiling")
    labels = {**ATTRIBUTE_LABELS, "picture": "everything of an image"}
    keys = [(f"{name}_accuracy", label) for name, label in labels.items()]
    return [
        {"label": label, "model": measured[key], **{name: reached[name].get(key) for name in ("drawn", "decoded")}}
        for key, label in keys
        if reached and measured.get(key) is not None
    ]


def _relations(measured: dict[str, Any]) -> list[dict[str, Any]]:
    found, reached = measured.get("relation_parts") or {}, measured.get("ceiling") or {}
    rows = []
    for part in PARTS:
        if found.get(part) is None:
            continue
        best = {name: reached.get(name, {}).get("relation_parts", {}).get(part) for name in ("drawn", "decoded")}
        numbers = {name: found[f"{part}_{name}"] for name in ("low", "high", "n")}
        rows.append({"label": PART_LABELS[part], "model": found[part], **numbers, **best})
    return rows


def _asked(tables: dict[str, dict[str, dict[str, int]]]) -> list[dict[str, Any]]:
    """attribute -> rows: what was asked for, how often it was read, and what was read instead, the most frequent."""
    found = []
    for attribute, rows in tables.items():
        lines = []
        for asked, reads in rows.items():
            total, others = sum(reads.values()), {read: n for read, n in reads.items() if read != asked}
            wrong = [f"{read} {n}" for read, n in list(others.items())[:MOST_READ]]
            right = reads.get(asked, 0)
            lines.append({"asked": asked, "n": total, "right": right / total, "instead": ", ".join(wrong)})
        found.append({"label": ATTRIBUTE_LABELS[attribute], "rows": lines})
    return found
