"""The sheet of a fine-tuning: each prompt before it, at the lowest held-out loss, and at its end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.finetuning.sheet import draw_losses, make_sheet, shown
from raphael.base.config.params import load_config
from raphael.base.images.grid import grid_tiles, image_grid
from raphael.base.stage import StageError

METRIC = "heldout/ema/denoise"
PROMPTS = ["a dog", "a cat", "two cats", "a red boat", "the sea"]
LEVELS = {0: 10, 320: 90, 640: 160, 960: 230}  # of grey, by images seen


def points(*losses: float) -> list[dict[str, float]]:
    return [{"images": 320 * place, METRIC: loss} for place, loss in enumerate(losses)]


GRIDS = {images: Path(f"{images:06d}.png") for images in LEVELS}


def test_over_trained_is_what_comes_after_the_lowest_held_out_loss():
    found = shown(points(0.9, 0.5, 0.4, 0.6), GRIDS, METRIC)
    assert found.columns == (("before", 0), ("after", 640), ("over-trained", 960))
    assert found.best == (640, 0.4) and found.last == (960, 0.6)
    assert "lowest after 640 images (0.4000), which models/raphael is; at 960 it was 0.6000" in found.line()


def test_a_loss_that_still_falls_has_no_such_column_and_that_is_said():
    found = shown(points(0.9, 0.5, 0.4, 0.3), GRIDS, METRIC)
    assert found.columns == (("before", 0), ("after", 960)) and "still fell at the end" in found.line()


def test_without_a_held_out_loss_there_is_before_and_after():
    found = shown([], GRIDS, METRIC)
    assert found.columns == (("before", 0), ("after", 960)) and "nothing was held out" in found.line()
    with pytest.raises(StageError, match="got no grids"):
        shown([], {}, METRIC)


def test_the_grid_nearest_to_the_best_point_stands_for_it():
    found = shown(points(0.9, 0.5, 0.3, 0.6), {0: Path("a"), 480: Path("b"), 960: Path("c")}, METRIC)
    assert found.columns == (("before", 0), ("after", 480), ("over-trained", 960))


@pytest.fixture
def workspace(tmp_path, project):
    samples = tmp_path / "models/raphael/samples"
    samples.mkdir(parents=True)
    for images, level in LEVELS.items():
        tiles = [np.full((64, 64, 3), level + place, np.uint8) for place in range(len(PROMPTS))]
        image_grid(tiles, 4, PROMPTS).save(samples / f"{images:06d}.png")
    model = tmp_path / "models/raphael"
    (model / "heldout.json").write_text(json.dumps(points(0.9, 0.5, 0.4, 0.6)))
    (model / "curves.json").write_text(json.dumps([{"images": 320, "train/denoise": 0.5}]))
    config = load_config(project / "params.yaml")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, sample_prompts=tuple(PROMPTS))), tmp_path


def test_a_row_is_a_prompt_and_a_column_a_point_of_the_training(workspace):
    found, sheet = make_sheet(*workspace)
    assert len(found.columns) == 3
    tiles = grid_tiles(np.asarray(sheet), 3 * len(PROMPTS), 3)
    for row in range(len(PROMPTS)):
        for column, images in enumerate((0, 640, 960)):
            tile = tiles[3 * row + column][8:-8, 8:-8]
            assert (tile == LEVELS[images] + row).all(), (row, column)


def test_the_losses_are_drawn(workspace, tmp_path):
    config, root = workspace
    draw_losses(config, root, tmp_path / "losses.png")
    with Image.open(tmp_path / "losses.png") as drawn:
        assert drawn.width > 500 and len(np.unique(np.asarray(drawn.convert("L")))) > 10
