"""Growth over the training: the probe's curves, and the fixed prompts cut out of the grids again."""

import json

import numpy as np
import pytest

from raphael.base.images.grid import grid_tiles, image_grid
from raphael.base.images.growth import fixed_prompts
from raphael.evaluate.report.growth import LABELS, probe_curves, strip


def tiles(count, side=16, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_tiles_cut_out_of_a_grid_are_the_images_that_were_laid_into_it(count):
    images = tiles(count)
    captions = [f"prompt {index} of several words that may break the line" for index in range(count)]
    cut = grid_tiles(np.asarray(image_grid(images, 4, captions)), count, 4)
    assert len(cut) == count
    for image, tile in zip(images, cut):
        assert np.array_equal(tile, image.repeat(10, 0).repeat(10, 1)), "enlarged by a whole factor to 160 px"


def test_a_grid_of_another_number_of_images_is_refused():
    grid = np.asarray(image_grid(tiles(8), 4, ["x"] * 8))
    with pytest.raises(ValueError, match="expected 3 images in 3"):
        grid_tiles(grid, 3, 4)


def test_fixed_prompts_are_the_settings_own_or_the_suites_in_turn():
    entries = [{"suite": s, "prompt": p} for s, p in (("a", "1"), ("a", "1"), ("a", "2"), ("b", "3"), ("b", "4"))]
    assert fixed_prompts((), 3, entries) == ["1", "3", "4"]
    assert fixed_prompts(("own",), 3, entries) == ["own"] and fixed_prompts((), 3, []) == []


def test_the_strip_has_a_row_a_prompt_and_the_first_and_last_moment(tmp_path):
    prompts = [f"prompt {index}" for index in range(7)]
    for moment in range(11):
        image_grid(tiles(7, seed=moment), 4, prompts).save(tmp_path / f"{1600 * moment:06d}.png")
    found = strip(tmp_path, prompts)
    assert len(found["moments"]) == 8 and (found["moments"][0], found["moments"][-1]) == ("0", "16,000")
    assert [row["prompt"] for row in found["rows"]] == prompts[:6]
    assert all(len(row["uris"]) == 8 and len(set(row["uris"])) == 8 for row in found["rows"])
    assert strip(tmp_path, prompts[:3]) is None, "grids of another number of prompts say nothing of these"
    assert strip(tmp_path / "none", prompts) is None


def test_the_probes_curves_are_those_of_the_average_that_is_shown_one_a_fact(tmp_path):
    points = [
        {"images": images, "heldout/ema/probe/shape": 0.5 + share, "heldout/raw/probe/shape": 0.1}
        for images, share in ((0, 0.0), (100, 0.25), (200, 0.5))
    ]
    (tmp_path / "heldout.json").write_text(json.dumps(points))
    found = probe_curves(tmp_path / "heldout.json")
    assert found["weights"] == "ema"
    ((label, last),) = [(chart["label"], chart["last"]) for chart in found["charts"]]
    assert (label, last) == (LABELS["shape"], "100 %") and "<path" in found["charts"][0]["svg"]
    height, top, bottom = 160, 10, 28
    middle = top + (height - top - bottom) / 2
    assert f"M54.0 {middle:.1f} L" in found["charts"][0]["svg"], "one half, chance, is the middle of the chart"
    (tmp_path / "heldout.json").write_text(json.dumps([{"images": 0, "heldout/ema/denoise": 0.2}]))
    assert probe_curves(tmp_path / "heldout.json") is None and probe_curves(tmp_path / "none.json") is None
