"""What the report shows, read from a workspace: each function gives one section's data, empty where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from raphael.base import strict
from raphael.base.config.sampling import Sampling
from raphael.base.images.fit import read_image
from raphael.base.pipeline import funnel_stages
from raphael.base.stage import StageError, read_json
from raphael.evaluate.catalogue import metric_of
from raphael.evaluate.report import figures

ATTRIBUTE_LABELS = {
    "background_colour": "background colour",
    "shape_colour": "object colour",
    "shape": "object shape",
    "relation": "spatial relation",
    "count": "number of objects",
    "text": "printed word",
    "style": "drawing style",
    "class": "class",
}
GALLERY_PER_SUITE = {"single": 10}
GALLERY_OTHERS = 5


DROPPED = "dropped.json"  # images by stage and reason; data_pipeline/common/dropped.py writes it


def funnel(reports: Path, with_images: bool = True) -> list[dict[str, Any]]:
    """Rows in, kept and dropped of each stage that ran, with some of the dropped images; reports: of a workspace.

    `broken`: the numbers of two neighbours do not fit; `rehearsal`: so many photographs answered in the web's place.
    """
    stages: list[dict[str, Any]] = []
    shown = read_json(reports / DROPPED) if with_images and (reports / DROPPED).is_file() else {}
    for name in funnel_stages(reports.resolve().parent):
        path = reports / f"{name}.json"
        if not path.is_file():
            continue
        report = read_json(path)
        before = stages[-1]["kept"] if stages else report["total"]
        first = stages[0]["total"] if stages else report["total"]
        dropped = sorted(report["dropped"].items(), key=lambda item: (-item[1], item[0]))
        stages.append(
            {
                "name": name,
                "total": report["total"],
                "kept": report["kept"],
                "dropped": [{"reason": reason, "count": count} for reason, count in dropped],
                "pictures": [
                    {"reason": reason, "cards": shown[name][reason]}
                    for reason, _ in dropped
                    if reason in shown.get(name, {})
                ],
                "rehearsal": report.get("rehearsal", {}).get("photographs", 0),
                "share_in": report["total"] / first if first else 0.0,
                "share_kept": report["kept"] / first if first else 0.0,
                "broken": report["total"] != before,
            }
        )
    return stages


def buckets(reports: Path) -> list[dict[str, Any]]:
    """The sizes that images are trained at, as "height x width", each with its number of images and their share."""
    path = reports / "encode.json"
    counts = read_json(path).get("buckets", {}) if path.is_file() else {}
    total = max(1, sum(counts.values()))
    return [
        {"size": name.replace("x", " × "), "count": count, "share": count / total} for name, count in counts.items()
    ]


def charts(path: Path, losses: Sequence[str]) -> list[dict[str, str]]:
    """Loss curves: one small chart a loss. curves.json is a list of points {"images", "train/<name>": value}.

    losses: the system's own, in their order.
    """
    if not path.is_file():
        return []
    points = read_json(path)
    if isinstance(points, dict):
        points = points.get("history") or points.get("points") or []
    found = {name for point in points for name in point if name != "images"}
    names = sorted(found, key=lambda name: _chart_order(name, losses))
    result = []
    for name in names:
        series = [(float(point["images"]), float(point[name])) for point in points if name in point]
        label = name.removeprefix("train/").replace("_", " ")
        if len(series) > 1 and ("loss" in name or label in losses):
            svg = figures.line_chart({label: series}, width=420, height=200)
            result.append({"label": label, "svg": svg, "last": f"{series[-1][1]:.4g}"})
    return result[:6]


def grids(folder: Path, limit: int) -> list[dict[str, str]]:
    """The sample grids generated while training, at most `limit`, the last one always among them."""
    files = sorted(folder.glob("*.png")) if folder.is_dir() else []
    if len(files) > limit:
        files = [files[int(index)] for index in np.linspace(0, len(files) - 1, limit).round()]
    found = []
    for file in files:
        found.append(
            {
                "images": f"{int(file.stem):,}" if file.stem.isdigit() else file.stem,
                "uri": figures.data_uri(read_image(file, again="run the stage train again"), max_side_px=900),
            }
        )
    return found


def gallery(folder: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first images of each suite (not the best ones), with what was asked and what the reader saw."""
    suites = []
    for suite in dict.fromkeys(entry["suite"] for entry in entries):
        members = [entry for entry in entries if entry["suite"] == suite][
            : GALLERY_PER_SUITE.get(suite, GALLERY_OTHERS)
        ]
        cards = []
        for entry in members:
            image = load(folder / entry["file"])
            cards.append(
                {"prompt": entry["prompt"], "uri": figures.data_uri(image), "checks": asked_and_read(image, entry)}
            )
        suites.append({"name": suite, "cards": cards})
    return suites


def asked_and_read(image: np.ndarray, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """[{name, right, read}] of what the prompt states; of a label the shape; [] where neither truth nor label is."""
    if not entry.get("truth"):
        return _class_check(image, entry) if entry.get("label") else []
    from raphael.evaluate.scenes.reader import judge, read_scene

    truth, reading = entry["truth"], read_scene(image)
    objects = " + ".join(f"{item.colour} {item.shape}" for item in reading.objects) or "nothing"
    read = {
        "background_colour": reading.background_colour,
        "shape_colour": " + ".join(item.colour for item in reading.objects) or "nothing",
        "shape": " + ".join(item.shape for item in reading.objects) or "nothing",
        "relation": objects,
        "count": str(reading.count),
        "text": reading.text or "no word",
        "style": reading.style or "unclear",
    }
    verdict = judge(reading, truth)
    return [
        {
            "name": ATTRIBUTE_LABELS[name].split()[-1] if name != "background_colour" else "background",
            "right": right,
            "read": read[name],
        }
        for name, right in verdict.items()
        if right is not None
    ]


def _class_check(image: np.ndarray, entry: dict[str, Any]) -> list[dict[str, Any]]:
    from raphael.evaluate.scenes.classes import shape_of, too_small
    from raphael.evaluate.scenes.reader import SHAPES, read_scene

    if entry["label"] not in SHAPES or too_small(image):
        return []
    shape = shape_of(read_scene(image))
    return [{"name": "class", "right": shape == entry["label"], "read": shape or "nothing"}]


def accuracies(measured: dict[str, Any]) -> dict[str, Any] | None:
    rows = []
    for name, label in ATTRIBUTE_LABELS.items():
        key = f"{name}_accuracy"
        if measured.get(key) is not None:
            chance = measured.get("chance", {}).get(key)
            rows.append(
                {
                    "name": name,
                    "label": label,
                    "value": measured[key],
                    "low": measured[f"{key}_low"],
                    "high": measured[f"{key}_high"],
                    "n": measured[f"{key}_n"],
                    "chance": chance,
                }
            )
    if not rows:
        return None
    return {"rows": rows, "svg": figures.interval_chart(rows), "headline": rows[:3]}


def by_suite(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per suite, one cell per attribute: the accuracy or None."""
    return [
        {
            "name": suite,
            "pictures": rows["pictures"],
            "cells": [rows.get(f"{name}_accuracy") for name in ATTRIBUTE_LABELS if name != "class"],
        }
        for suite, rows in measured.get("by_suite", {}).items()
    ]


FID = ("Fréchet inception distance", "to the training images; smaller is nearer")
OF_OTHERS = "_of_other_prompts"
CLIP_FEATURES = ("Fréchet distance, CLIP features", "to the training images; not FID, compare only with its like")
OTHERS = ("… of other prompts", "what a model that ignores its prompt would reach")
MEASURES = {  # of a metric of raphael/evaluate/catalogue.py; another one is called by its own name
    "frechet": ("Fréchet distance", "to the training images; not FID, compare only with its like"),
    "clip_score": ("CLIP score", "mean cosine of image and prompt"),
    "retrieval": ("prompt retrieval", "the image finds its own prompt among so many"),
    "nearest_reference": ("nearest training image", "mean cosine; near 1 is memory, not invention"),
    "class_ceiling": ("class of drawn truth", "what the detector reads right in drawn images of the same size"),
}
COUNTED = ("scenes", "class_accuracy")  # they have a chart of their own


def measures(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """[{key, label, note, value}]: every number that a metric gave, but for those that are counted attributes."""
    rows = []
    for key, value in measured.items():
        others = key.endswith(OF_OTHERS)
        metric = metric_of(key.removesuffix(OF_OTHERS))
        if metric is None or metric.name in COUNTED or not isinstance(value, float):
            continue
        label, note = MEASURES.get(metric.name, (metric.name.replace("_", " "), metric.about))
        if metric.name == "frechet":
            label, note = FID if key.startswith("fid_") else CLIP_FEATURES if "clip" in key else (label, note)
        label, note = OTHERS if others else (label, note)
        rows.append({"key": key, "label": label, "note": note, "value": f"{value:.4g}"})
    return rows


def sampling(settings: dict[str, Any]) -> str:
    """How the images were generated, in words: sampler, steps and guidance, and what is not at its default."""
    words = [f"{settings['sampler']}", f"{settings['steps']} steps", f"guidance {settings['guidance_scale']}"]
    low, high = settings.get("guidance_interval", (0.0, 1.0))
    if (low, high) != (0.0, 1.0):
        words[-1] += f" for t from {low:.0%} to {high:.0%}"
    if settings.get("eta", 0.0):
        words.append(f"eta {settings['eta']}")
    kind = settings.get("threshold", "none")
    if kind != "none":
        at = f" at {settings['threshold_percentile']} %" if kind == "dynamic" else ""
        words.append(f"{kind} threshold{at}")
    more = [field.name for field in fields(Sampling) if field.metadata.get("later") and field.name in settings]
    words += [f"{name.replace('_', ' ')} {settings[name]}" for name in more]  # they are there where not at the default
    return ", ".join(words)


def paths(folder: Path, model: str) -> str:
    """What `raphael paths ... --out reports/paths` found, "" where there is nothing of this model.

    Drawn anew from numbers and images: section.html beside them is for people, and whatever stands in it would be
    a part of this page. Raises StageError where paths.json is not what that command writes.
    """
    from jinja2 import TemplateError

    from raphael.evaluate.studies.path_report import section

    file = folder / "paths.json"
    report = read_json(file) if file.is_file() else {}
    if not isinstance(report, dict) or report.get("model") != model:
        return ""
    try:
        return section(report, folder)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise StageError(f"{file}: not what raphael paths writes ({str(error)[:100]}); run it again") from None


def hero(folder: Path, entries: list[dict[str, Any]], count: int = 10) -> list[dict[str, str]]:
    chosen = entries[:count]
    return [{"uri": figures.data_uri(load(folder / entry["file"])), "prompt": entry["prompt"]} for entry in chosen]


def provenance(listing: dict[str, Any], model: Path, params: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups of name and value: what this page speaks of, exactly."""
    meta = read_json(model / "meta.json") if (model / "meta.json").is_file() else {}
    identity = {"model": listing["model"], "preset": params["model"]["preset"]}
    identity |= {key: value for key, value in meta.items() if isinstance(value, str | int) and key not in identity}
    groups = [{"name": "model", "rows": [(key, str(value)) for key, value in identity.items()]}]
    groups.append({"name": "sampling", "rows": [(key, str(value)) for key, value in listing["settings"].items()]})
    for section in ("source", "filter", "train", "diffusion", "unet"):
        values = meta.get(section) if section in ("diffusion", "unet") else params[section]
        if values:
            rows = [
                (key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
                for key, value in strict.flatten(values).items()
            ]
            groups.append({"name": section, "rows": rows})
    return groups


def load(path: Path) -> np.ndarray:
    return read_image(path, again="run the stage generate again")


def _chart_order(name: str, order: Sequence[str]) -> tuple[int, str]:
    label = name.removeprefix("train/")
    ranks = [rank for rank, part in enumerate(order) if label.startswith(part)]
    return (ranks[0] if ranks else len(order), name)
