"""What the report shows, read from a workspace: each function gives one section's data, empty where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from raphael import strict
from raphael.config import Config, GenerateConfig
from raphael.evaluate import figures
from raphael.stage import StageError, read_json

FUNNEL_STAGES = ("source", "select", "download", "filter", "captions", "encode")
ATTRIBUTE_LABELS = {
    "background_colour": "background colour",
    "shape_colour": "object colour",
    "shape": "object shape",
    "relation": "spatial relation",
    "count": "number of objects",
    "text": "printed word",
    "style": "drawing style",
}
GALLERY_PER_SUITE = {"single": 10}
GALLERY_OTHERS = 5
SMALL_WORDS = {
    "a",
    "an",
    "the",
    "of",
    "on",
    "in",
    "with",
    "and",
    "is",
    "to",
    "at",
    "for",
    ",",
    ".",
    "drawing",
    "picture",
    "image",
    "drawn",
    "plain",
}
MAX_ROUTED_WORDS = 9
INSIDE_PROMPTS = 3


DROPPED = "dropped.json"  # pictures by stage and reason; data_pipeline/card_pictures.py writes it


def funnel(reports: Path, with_pictures: bool = True) -> list[dict[str, Any]]:
    """Rows in, kept and dropped of each stage that ran, with some of the dropped pictures.

    `broken`: the numbers of two neighbours do not fit; `rehearsal`: so many photographs answered in the web's place.
    """
    stages: list[dict[str, Any]] = []
    shown = read_json(reports / DROPPED) if with_pictures and (reports / DROPPED).is_file() else {}
    for name in FUNNEL_STAGES:
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
    """The sizes that pictures are trained at, as "height x width", each with its number of pictures and their share."""
    path = reports / "encode.json"
    counts = read_json(path).get("buckets", {}) if path.is_file() else {}
    total = max(1, sum(counts.values()))
    return [
        {"size": name.replace("x", " × "), "count": count, "share": count / total} for name, count in counts.items()
    ]


def charts(path: Path) -> list[dict[str, str]]:
    """Loss curves: one small chart a loss. curves.json is a list of points {"images", "train/<name>": value}."""
    if not path.is_file():
        return []
    points = read_json(path)
    if isinstance(points, dict):
        points = points.get("history") or points.get("points") or []
    names = sorted({name for point in points for name in point if name != "images"}, key=_chart_order)
    result = []
    for name in names:
        series = [(float(point["images"]), float(point[name])) for point in points if name in point]
        label = name.removeprefix("train/").replace("_", " ")
        if len(series) > 1 and ("loss" in name or label in ("denoise", "edge", "balance")):
            svg = figures.line_chart({label: series}, width=420, height=200)
            result.append({"label": label, "svg": svg, "last": f"{series[-1][1]:.4g}"})
    return result[:6]


def grids(folder: Path, limit: int) -> list[dict[str, str]]:
    """The sample grids drawn while training, at most `limit`, the last one always among them."""
    from PIL import Image

    files = sorted(folder.glob("*.png")) if folder.is_dir() else []
    if len(files) > limit:
        files = [files[int(index)] for index in np.linspace(0, len(files) - 1, limit).round()]
    found = []
    for file in files:
        with Image.open(file) as image:
            found.append(
                {
                    "images": f"{int(file.stem):,}" if file.stem.isdigit() else file.stem,
                    "uri": figures.data_uri(np.asarray(image.convert("RGB")), max_side_px=900),
                }
            )
    return found


def gallery(folder: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first pictures of each suite (not the best ones), with what was asked and what the reader saw."""
    suites = []
    for suite in dict.fromkeys(entry["suite"] for entry in entries):
        members = [entry for entry in entries if entry["suite"] == suite][
            : GALLERY_PER_SUITE.get(suite, GALLERY_OTHERS)
        ]
        cards = []
        for entry in members:
            picture = load(folder / entry["file"])
            cards.append(
                {"prompt": entry["prompt"], "uri": figures.data_uri(picture), "checks": _checks(picture, entry)}
            )
        suites.append({"name": suite, "cards": cards})
    return suites


def _checks(picture: np.ndarray, entry: dict[str, Any]) -> list[dict[str, Any]]:
    if not entry.get("truth"):
        return []
    from raphael.evaluate.scene_reader import judge, read_scene

    truth, reading = entry["truth"], read_scene(picture)
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
            "cells": [rows.get(f"{name}_accuracy") for name in ATTRIBUTE_LABELS],
        }
        for suite, rows in measured.get("by_suite", {}).items()
    ]


MEASURES = (
    ("fid_", "Fréchet inception distance", "to the training pictures; smaller is nearer"),
    ("fd_", "Fréchet distance, CLIP features", "to the training pictures; not FID, compare only with its like"),
    ("clip_score", "CLIP score", "mean cosine of picture and prompt"),
    ("retrieval_of_", "prompt retrieval", "the picture finds its own prompt among so many"),
    ("nearest_training", "nearest training picture", "mean cosine; near 1 is memory, not invention"),
)


def measures(measured: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for key, value in measured.items():
        for prefix, label, note in MEASURES:
            if key.startswith(prefix) and isinstance(value, float):
                if key.endswith("_of_other_prompts"):
                    label, note = "… of other prompts", "what a model that ignores its prompt would reach"
                rows.append({"key": key, "label": label, "note": note, "value": f"{value:.4g}"})
    return rows


def drawing(settings: dict[str, Any]) -> str:
    """How the pictures were drawn, in words: sampler, steps and guidance, and what is not at its default."""
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
    return ", ".join(words)


def paths(folder: Path, model: str) -> str:
    """The section that `raphael paths ... --out reports/paths` wrote, "" where there is none of this model."""
    if not (folder / "paths.json").is_file() or read_json(folder / "paths.json").get("model") != model:
        return ""
    return (folder / "section.html").read_text(encoding="utf-8")


def hero(folder: Path, entries: list[dict[str, Any]], count: int = 10) -> list[dict[str, str]]:
    chosen = entries[:count]
    return [{"uri": figures.data_uri(load(folder / entry["file"])), "prompt": entry["prompt"]} for entry in chosen]


def inside(config: Config, model: Path, generated: Path, drawn: dict[str, Any]) -> dict[str, Any]:
    """Attention per word, edges and routes of one prompt per suite, and the time table."""
    from raphael.encoders.edges import edge_map
    from raphael.evaluate.routes import time_table, token_routes
    from raphael.generate.insight import look_inside
    from raphael.generate.pipeline import RaphaelPipeline
    from raphael.sampling import decode_pictures, draw_latents, sampling_of

    pipeline = RaphaelPipeline.from_pretrained(model)
    entries = _one_per_suite(drawn["images"])
    settings, parts = drawn["settings"], pipeline.parts()
    prompts, seeds = [entry["prompt"] for entry in entries], [(settings["seed"], entry["index"]) for entry in entries]
    recorded = strict.load(GenerateConfig, settings, str(generated / "images.json"), "settings")
    sampling = replace(sampling_of(recorded), precision="fp32")
    latents = draw_latents(parts, prompts, seeds, sampling)
    seen = look_inside(parts, pipeline.text_encoder, prompts, latents, seeds)
    pictures = decode_pictures(parts, latents)
    side = seen.edges.shape[1:]
    encode = config.encode
    targets = edge_map(pictures, side, encode.edge_detector, encode.edge_threshold, encode.edge_weights)
    examples = []
    for row, prompt in enumerate(prompts):
        words = token_routes(pipeline, prompt)
        named = [word for word in words if not _is_marker(word["word"])] or words
        content = [word for word in named if word["word"] not in SMALL_WORDS] or named
        shown = [i for i, word in enumerate(seen.words[row]) if word and not _is_marker(word)][:12]
        examples.append(
            {
                "prompt": prompt,
                "uri": figures.data_uri(pictures[row]),
                "heat": [
                    {
                        "word": seen.words[row][i],
                        "uri": figures.data_uri(figures.heat_overlay(pictures[row], seen.attention[row, i])),
                    }
                    for i in shown
                ],
                "edge_target": figures.data_uri(_enlarged(targets[row])),
                "edge_predicted": figures.data_uri(_enlarged(np.uint8(seen.edges[row] * 255))),
                "routes": figures.routes_chart(content[:MAX_ROUTED_WORDS], pipeline.unet.config.num_space_experts),
            }
        )
    return {
        "insight": examples,
        "insight_timestep": seen.timestep,
        "edge_detector": config.encode.edge_detector,
        "times": figures.time_chart(time_table(pipeline)),
        "mean_over": pipeline.unet.config.mean_over,
        "num_experts": [pipeline.unet.config.num_space_experts, pipeline.unet.config.num_time_experts],
    }


def provenance(drawn: dict[str, Any], model: Path, params: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups of name and value: what this page speaks of, exactly."""
    meta = read_json(model / "meta.json") if (model / "meta.json").is_file() else {}
    identity = {"model": drawn["model"], "preset": params["model"]["preset"]}
    identity |= {
        key: meta[key] for key in ("git_revision", "records_sha256", "images_seen", "mean_over") if key in meta
    }
    groups = [{"name": "model", "rows": [(key, str(value)) for key, value in identity.items()]}]
    groups.append({"name": "drawing", "rows": [(key, str(value)) for key, value in drawn["settings"].items()]})
    for section in ("source", "filter", "train", "diffusion", "unet"):
        values = meta.get(section) if section in ("diffusion", "unet") else params[section]
        if values:
            groups.append({"name": section, "rows": list(_flat(values))})
    return groups


def load(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (FileNotFoundError, SyntaxError, OSError) as error:
        raise StageError(f"{path}: not a whole picture ({error}); run the stage generate again") from None


def _one_per_suite(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first = {entry["suite"]: entry for entry in reversed(entries)}
    chosen = list(first.values())[::-1] if len(first) > 1 else entries
    return chosen[:INSIDE_PROMPTS]


def _is_marker(word: str) -> bool:
    """Beginning and end of the text: not words, but tokens with a route of their own."""
    return word.startswith("<") and word.endswith(">")


def _enlarged(picture: np.ndarray, least_px: int = 64) -> np.ndarray:
    times = max(1, -(-least_px // picture.shape[0]))
    return np.repeat(np.repeat(picture, times, 0), times, 1)


def _flat(values: dict[str, Any], prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _chart_order(name: str) -> tuple[int, str]:
    order = ("loss", "denoise", "edge", "balance")
    label = name.removeprefix("train/")
    ranks = [rank for rank, part in enumerate(order) if label.startswith(part)]
    return (ranks[0] if ranks else len(order), name)
