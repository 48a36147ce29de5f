"""How the model grew: what the probe knew at every held-out evaluation, and the fixed prompts as training went on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from raphael.base.images.fit import read_image
from raphael.base.images.grid import grid_tiles
from raphael.base.images.growth import COLUMNS
from raphael.base.stage import read_json
from raphael.evaluate.instruments.probe import LABELS
from raphael.evaluate.report import figures

MAX_PROMPTS, MAX_MOMENTS = 6, 8  # of the strip
TILE_PX = 96


def probe_curves(file: Path) -> dict[str, Any] | None:
    """{weights, charts: [{label, svg, last}]} of heldout.json's points; None where no probe ran while training.

    Of several averages of the weights that called ema is shown, else the first.
    """
    if not file.is_file():
        return None
    points = read_json(file)
    keys = list(dict.fromkeys(key for point in points for key in point if "/probe/" in key))
    if not keys:
        return None
    weights = sorted({key.split("/")[1] for key in keys}, key=lambda name: (name != "ema", name))[0]
    charts = []
    for fact, label in LABELS.items():
        key = f"heldout/{weights}/probe/{fact}"
        curve = [(float(point["images"]), float(point[key])) for point in points if point.get(key) is not None]
        if len(curve) > 1:
            svg = figures.line_chart({label: curve}, width=420, height=160, span=(0.0, 1.0))
            charts.append({"label": label, "svg": svg, "last": f"{100 * curve[-1][1]:.0f} %"})
    return {"weights": weights, "charts": charts} if charts else None


def strip(samples: Path, prompts: list[str]) -> dict[str, Any] | None:
    """{moments: ["0", "6,400", ...] images seen, rows: [{prompt, uris}]} of the first MAX_PROMPTS prompts, at evenly
    spread moments with the first and the last; None for fewer than two grids or grids of other prompts."""
    files = sorted(file for file in samples.glob("*.png") if file.stem.isdigit()) if samples.is_dir() else []
    if len(files) < 2 or not prompts:
        return None
    places = np.unique(np.linspace(0, len(files) - 1, min(MAX_MOMENTS, len(files))).round().astype(int))
    try:
        moments = [
            grid_tiles(read_image(files[place], again="run the stage train again"), len(prompts), COLUMNS)
            for place in places
        ]
    except ValueError:
        return None  # grids of another number of prompts: settings have changed since
    rows = [
        {"prompt": prompt, "uris": [figures.data_uri(tiles[row], TILE_PX) for tiles in moments]}
        for row, prompt in enumerate(prompts[:MAX_PROMPTS])
    ]
    return {"moments": [f"{int(files[place].stem):,}" for place in places], "rows": rows}
