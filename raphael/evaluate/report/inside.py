"""The report's sections that are RAPHAEL's own: where words look, edges, routes through the experts, knock-outs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from raphael.base import strict
from raphael.base.config.params import Config, GenerateConfig
from raphael.base.stage import device_of
from raphael.evaluate.report import figures
from raphael.evaluate.report.figures import NUM_EXPERT_COLOURS
from raphael.evaluate.report.routes import time_table, token_routes

NOTHING: dict[str, Any] = {"insight": [], "times": None, "mean_over": None}  # where there is no model to look into
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


def inside(config: Config, model: Path, generated: Path, listing: dict[str, Any]) -> dict[str, Any]:
    """Attention per word, edges and routes of one prompt per suite, and the time table."""
    from raphael.diffusion.sampling import decode_images, generate_latents, sampling_of
    from raphael.encoders.edges.detectors import edge_map
    from raphael.generate.pipeline import RaphaelPipeline
    from raphael.summary.insight import look_inside

    pipeline = RaphaelPipeline.from_pretrained(model, device=device_of(config))
    entries = _one_per_suite(listing["images"])
    settings, parts = listing["settings"], pipeline.parts()
    prompts, seeds = [entry["prompt"] for entry in entries], [(settings["seed"], entry["index"]) for entry in entries]
    recorded = strict.load(GenerateConfig, settings, str(generated / "images.json"), "settings")
    sampling = replace(sampling_of(recorded), precision="fp32")
    latents = generate_latents(parts, prompts, seeds, sampling)
    seen = look_inside(parts, pipeline.text_encoder, prompts, latents, seeds)
    images = decode_images(parts, latents)
    side = seen.edges.shape[1:]
    encode = config.encode
    told = encode.edge_detector, encode.edge_threshold, encode.edge_weights
    targets = edge_map(images, side, *told, pipeline.device)
    examples = []
    for row, prompt in enumerate(prompts):
        words = token_routes(pipeline, prompt)
        named = [word for word in words if not _is_marker(word["word"])] or words
        content = [word for word in named if word["word"] not in SMALL_WORDS] or named
        shown = [i for i, word in enumerate(seen.words[row]) if word and not _is_marker(word)][:12]
        examples.append(
            {
                "prompt": prompt,
                "uri": figures.data_uri(images[row]),
                "heat": [
                    {
                        "word": seen.words[row][i],
                        "uri": figures.data_uri(figures.heat_overlay(images[row], seen.attention[row, i])),
                    }
                    for i in shown
                ],
                "edge_target": figures.data_uri(_enlarged(targets[row])),
                "edge_predicted": figures.data_uri(_enlarged(np.uint8(seen.edges[row] * 255))),
                "routes": routes_chart(content[:MAX_ROUTED_WORDS], pipeline.unet.config.num_space_experts),
            }
        )
    return {
        "insight": examples,
        "insight_timestep": seen.timestep,
        "edge_detector": config.encode.edge_detector,
        "times": time_chart(time_table(pipeline)),
        "mean_over": pipeline.unet.config.mean_over,
        "num_experts": [pipeline.unet.config.num_space_experts, pipeline.unet.config.num_time_experts],
    }


def knockouts(measured: dict[str, Any] | None) -> dict[str, Any] | None:
    if not measured or not measured["parts"]:
        return None
    rows = [{**row, "label": row["part"].replace("_", " ")} for row in measured["parts"]]
    inside = {"cover": measured["mask_cover"], **measured["gate_entropy"]}
    shown = {name: ["·" if value is None else f"{value:.2f}" for value in values] for name, values in inside.items()}
    whole = [row for row in rows if row["block"] is None]
    inert = [row["label"] for row in whole if row["inert"]]
    blocks = [row for row in rows if row["block"] is not None]
    return {"n": measured["n"], "loss": measured["loss"], "rows": whole, "blocks": blocks, "inert": inert, **shown}


def routes_chart(words: Sequence[dict[str, Any]], num_experts: int, width: int = 960) -> str:
    """Every word's way through the blocks: a column a block, in it one slot per expert, a ribbon a word.

    words: {"word", "experts": [one per block]}. Words that share an expert run side by side in its slot. "" where no
    block has Space-MoE.
    """
    blocks = len(words[0]["experts"])
    if not blocks:
        return ""
    crowd = max(sum(w["experts"][b] == word["experts"][b] for w in words) for word in words for b in range(blocks))
    thick = 5.5
    slot = max(34.0, thick * 1.4 * crowd + 12)  # as high as the fullest slot needs
    left, right, top, gap = 118, 24, 26, 14
    height = top + num_experts * (slot + gap) + 8
    step = (width - left - right) / max(blocks, 1)
    columns = [left + step * (block + 0.62) for block in range(blocks)]
    parts = [f'<svg class="chart routes" viewBox="0 0 {width} {height:.0f}" role="img" aria-label="routes of words">']
    for block, x in enumerate(columns):
        parts.append(f'<text class="tick" x="{x:.1f}" y="14" text-anchor="middle">block {block + 1}</text>')
        for expert in range(num_experts):
            y = top + expert * (slot + gap)
            parts.append(f'<rect class="slot" x="{x - 15:.1f}" y="{y:.1f}" width="30" height="{slot:.1f}" rx="6"/>')
            parts.append(
                f'<text class="slotname" x="{x - 22:.1f}" y="{y + 11:.1f}" text-anchor="end">{expert + 1}</text>'
            )
    lines = height - top - 8
    for index, word in enumerate(words):
        start = top + lines * (index + 0.5) / len(words)
        points = [(left - 6.0, start)]
        for block, expert in enumerate(word["experts"]):
            mates = [i for i, other in enumerate(words) if other["experts"][block] == expert]
            offset = (mates.index(index) + 0.5) / len(mates)
            inner = thick * 1.4 * len(mates)
            middle = top + expert * (slot + gap) + slot / 2
            points.append((columns[block], middle + (offset - 0.5) * inner))
        path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
        for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
            bend = (x1 - x0) * 0.5
            path += f" C{x0 + bend:.1f} {y0:.1f} {x1 - bend:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"
        path += f" h{right - 4:.0f}"
        colour = index % NUM_EXPERT_COLOURS
        parts.append(
            f'<path class="ribbon c{colour}" d="{path}" stroke-width="{thick}">'
            f"<title>{escape(word['word'])}</title></path>"
        )
        parts.append(
            f'<text class="word t{colour}" x="{left - 14}" y="{start + 4.5:.1f}" text-anchor="end">'
            f"{escape(word['word'])}</text>"
        )
    return "".join(parts) + "</svg>"


def time_chart(times: dict[str, Any], width: int = 960) -> str:
    """Blocks x timesteps, coloured by the time expert in charge; noise at the left, as an image comes to be.

    "" where no block has Time-MoE.
    """
    if not times["experts"]:
        return ""
    timesteps, experts = times["timesteps"][::-1], [row[::-1] for row in times["experts"]]
    left, top, row_px = 118, 22, 20
    height = top + row_px * len(experts) + 24
    step = (width - left) / len(timesteps)
    parts = [f'<svg class="chart times" viewBox="0 0 {width} {height}" role="img" aria-label="time routes">']
    parts.append(f'<text class="tick" x="{left}" y="13">noise, t = {timesteps[0]}</text>')
    parts.append(f'<text class="tick" x="{width}" y="13" text-anchor="end">t = {timesteps[-1]}, image</text>')
    for block, row in enumerate(experts):
        y = top + row_px * block
        parts.append(f'<text class="tick" x="{left - 14}" y="{y + 14}" text-anchor="end">block {block + 1}</text>')
        start = 0
        for index in range(1, len(row) + 1):  # equal neighbours are one rectangle
            if index == len(row) or row[index] != row[start]:
                x, w = left + step * start, step * (index - start)
                parts.append(
                    f'<rect class="f{row[start] % NUM_EXPERT_COLOURS}" '
                    f'x="{x:.2f}" y="{y}" width="{w:.2f}" height="{row_px - 4}"/>'
                )
                if w > 16:
                    parts.append(
                        f'<text class="inside" x="{x + w / 2:.1f}" y="{y + 12}" text-anchor="middle">'
                        f"{row[start] + 1}</text>"
                    )
                start = index
    return "".join(parts) + "</svg>"


def _one_per_suite(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first = {entry["suite"]: entry for entry in reversed(entries)}
    chosen = list(first.values())[::-1] if len(first) > 1 else entries
    return chosen[:INSIDE_PROMPTS]


def _is_marker(word: str) -> bool:
    """Beginning and end of the text: not words, but tokens with a route of their own."""
    return word.startswith("<") and word.endswith(">")


def _enlarged(image: np.ndarray, least_px: int = 64) -> np.ndarray:
    times = max(1, -(-least_px // image.shape[0]))
    return np.repeat(np.repeat(image, times, 0), times, 1)
