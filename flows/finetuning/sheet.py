"""What a fine-tuning did, on one sheet: each prompt before it, at its lowest held-out loss, and at its end, where it
may have learned the images by heart; and the losses beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raphael.base.images.fit import read_image
from raphael.base.images.grid import grid_tiles, image_grid
from raphael.base.images.growth import COLUMNS, fixed_prompts
from raphael.base.stage import StageError, read_json

if TYPE_CHECKING:
    from PIL import Image

    from raphael.base.config.params import Config

SHEET, CURVES = "sheet.png", "losses.png"


@dataclass(frozen=True)
class Shown:
    """columns: (what it is, images seen) of the sheet, from left to right. best, last: (images seen, held-out loss);
    None where nothing was held out."""

    columns: tuple[tuple[str, int], ...]
    best: tuple[int, float] | None
    last: tuple[int, float] | None

    def line(self) -> str:
        if self.best is None or self.last is None:
            return "nothing was held out: look at the sheet for the point at which it is enough"
        if self.last[0] == self.best[0]:
            return f"the held-out loss still fell at the end ({self.last[1]:.4f}): more images may do more"
        return (
            f"held-out loss lowest after {self.best[0]:,} images ({self.best[1]:.4f}), which models/raphael is; at "
            f"{self.last[0]:,} it was {self.last[1]:.4f}"
        )


def shown(heldout: list[dict[str, float]], grids: dict[int, Path], metric: str) -> Shown:
    """What the sheet has columns for. heldout: points of the held-out loss; grids: by images seen.

    Raises StageError where no grid is there.
    """
    if not grids:
        raise StageError("got no grids, expected some in models/raphael/samples; --sample-every says how often")
    points = [(int(point["images"]), point[metric]) for point in heldout if metric in point]
    first, last = min(grids), max(grids)
    columns = [("before", first)] if first == 0 else []
    if not points:
        return Shown((*columns, ("after", last)), None, None)
    best = min(points, key=lambda point: point[1])
    near = min(grids, key=lambda images: (abs(images - best[0]), images))
    columns.append(("after", near))
    if last > near:
        columns.append(("over-trained" if points[-1][1] > best[1] else "at the end", last))
    return Shown(tuple(columns), best, points[-1])


def make_sheet(config: Config, root: Path) -> tuple[Shown, Image.Image]:
    """The sheet of the workspace's trained model: a row for each prompt of its grids. Raises StageError."""
    model, train = root / "models/raphael", config.train
    heldout = read_json(model / "heldout.json") if (model / "heldout.json").is_file() else []
    grids = {int(path.stem): path for path in (model / "samples").glob("[0-9]*.png")}
    found = shown(heldout, grids, metric_of(config))
    entries = [] if train.sample_prompts else read_json(root / "data/source/prompts.json")["prompts"]
    prompts = fixed_prompts(train.sample_prompts, train.num_sample_prompts, entries)
    columns = []
    for _, images in found.columns:
        grid = read_image(grids[images], again="train again")
        columns.append(grid_tiles(grid, len(prompts), COLUMNS))
    tiles = [column[row] for row in range(len(prompts)) for column in columns]
    heads = [f"{name}, {images:,} images" for name, images in found.columns]
    captions = [f"{head}: {prompt}" for prompt in prompts for head in heads]
    return found, image_grid(tiles, len(columns), captions)


def metric_of(config: Config) -> str:
    return f"heldout/{'ema' if config.train.loop.ema_decay else 'raw'}/denoise"


def draw_losses(config: Config, root: Path, file: Path) -> None:
    """Training and held-out loss over the images seen. The two are not of one scale: training drops captions and
    shifts timesteps, the held-out loss does neither."""
    from matplotlib.figure import Figure

    model = root / "models/raphael"
    series: dict[str, list[tuple[float, float]]] = {"training": _points(read_json(model / "curves.json"))}
    if (model / "heldout.json").is_file():
        series["held out"] = _points(read_json(model / "heldout.json"), metric_of(config))
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots(1, len(series), squeeze=False)[0]
    for panel, (name, points) in zip(axes, series.items(), strict=True):
        panel.plot(*np.array(points).T, marker="o", markersize=3)
        panel.set_title(f"{name} loss", fontsize=10)
        panel.set_xlabel("images seen")
        if name == "held out":
            panel.axvline(min(points, key=lambda point: point[1])[0], linestyle=":", color="grey")
    figure.savefig(file, dpi=120)


def _points(history: list[dict[str, Any]], metric: str = "train/denoise") -> list[tuple[float, float]]:
    return [(point["images"], point[metric]) for point in history if metric in point]
