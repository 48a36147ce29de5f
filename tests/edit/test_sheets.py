"""Style sheets and grids: every cell is the pipeline's own image; what is there is not drawn again."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from truth.tiny_raphael import write_pipeline

from raphael.base.config.sampling import Sampling
from raphael.edit.rewrite import refine
from raphael.edit.run import How
from raphael.edit.sheets import Axis, Grid, axis_of, style_sheet
from raphael.generate.pipeline import RaphaelPipeline

PROMPT = "a red circle on blue"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    torch.set_num_threads(1)
    return RaphaelPipeline.from_pretrained(write_pipeline(tmp_path_factory.mktemp("model") / "raphael"))


def how(**changes):
    return How(seed=3, sampling=Sampling(steps=2, guidance_scale=2.0, **changes))


def test_axes_are_read_as_they_are_typed():
    assert axis_of("steps=5,10") == Axis("steps", (5, 10))
    assert axis_of("guidance_scale=1,1.5") == Axis("guidance_scale", (1, 1.5))
    assert axis_of("sampler=ddim,heun") == Axis("sampler", ("ddim", "heun"))
    assert axis_of("seed=0-3,9") == Axis("seed", (0, 1, 2, 3, 9))
    assert axis_of("prompt=a, b|c") == Axis("prompt", ("a, b", "c"))
    assert axis_of("guidance_interval=[0,0.5]|[0,1]") == Axis("guidance_interval", ([0, 0.5], [0, 1]))


def test_every_cell_is_the_pipelines_own_image_and_stands_where_its_axes_meet(pipeline, tmp_path):
    axes = (axis_of("guidance_scale=1,3"), axis_of("replace=red|green|blue"), axis_of("seed=4-5"))
    files = Grid(pipeline, PROMPT, axes, how()).save(tmp_path)
    assert [file.name for file in files] == ["grid-0.png", "grid-1.png", "grid.json"]
    listed = json.loads((tmp_path / "grid.json").read_text())["cells"]
    assert len(listed) == 12
    for cell in listed[::5]:
        scale, word, seed = cell["values"]
        sampling = Sampling(steps=2, guidance_scale=scale)
        plain = pipeline(PROMPT.replace("red", word), sampling=sampling, seed=seed, output_type="np").images[0]
        assert np.array_equal(np.asarray(Image.open(tmp_path / cell["file"])), np.uint8(np.rint(plain * 255)))
    sheet = np.asarray(Image.open(tmp_path / "grid-1.png"))
    by_values = {tuple(cell["values"]): tmp_path / cell["file"] for cell in listed}
    cell = np.asarray(Image.open(by_values[3, "green", 5])).repeat(5, 0).repeat(5, 1)  # 32 px shown at 160
    step_y, step_x = 160 + 39 + 8, 164
    assert np.array_equal(sheet[4 + step_y :][:160, 4 + step_x :][:, :160], cell)


def test_a_grid_that_was_killed_goes_on_and_a_longer_one_draws_what_is_new(pipeline, tmp_path, monkeypatch):
    first = Grid(pipeline, PROMPT, (axis_of("seed=0-1"),), how())
    seen = []
    first.save(tmp_path, seen.append)
    assert seen == [False, False]
    broken = sorted((tmp_path / "cells").iterdir())[0]
    broken.rename(broken.with_suffix(".part"))  # what a kill leaves
    seen.clear()
    Grid(pipeline, PROMPT, (axis_of("seed=0-2"),), how()).save(tmp_path, seen.append)
    assert sorted(seen) == [False, False, True]
    seen.clear()
    Grid(pipeline, PROMPT, (axis_of("seed=0-2"),), how(sampler="ddim")).save(tmp_path, seen.append)
    assert seen == [False] * 3


def test_a_style_sheet_is_a_refined_image_a_style(pipeline):
    edited = style_sheet(pipeline, PROMPT, ["pixel art", "an ink drawing of {prompt}"], how())
    assert edited.facts["target"] == [f"{PROMPT}, pixel art", f"an ink drawing of {PROMPT}"]
    for row, target in enumerate(edited.facts["target"]):
        one = refine(pipeline, PROMPT, target, how())
        for name in ("source", "result", "without"):
            assert np.array_equal(getattr(edited, name)[row], getattr(one, name)[0])
    assert np.array_equal(edited.source[0], edited.source[1])
    assert edited.sheet().size[1] > 2 * 160


def test_bad_axes_and_styles_are_refused(pipeline):
    with pytest.raises(ValueError, match="axis: got 'stepz=3', expected NAME=VALUES, NAME one of seed, prompt"):
        axis_of("stepz=3")
    with pytest.raises(ValueError, match="seed: got '3-1'"):
        axis_of("seed=3-1")
    with pytest.raises(ValueError, match="axis: got 'steps=', expected values"):
        axis_of("steps=")
    with pytest.raises(ValueError, match="steps"):
        Grid(pipeline, PROMPT, (axis_of("steps=many"),), how())
    with pytest.raises(ValueError, match="axes: got seed, seed"):
        Grid(pipeline, PROMPT, (axis_of("seed=1"), axis_of("seed=2")), how())
    with pytest.raises(ValueError, match="replace: got 'pink', expected words of the prompt"):
        Grid(pipeline, PROMPT, (axis_of("replace=pink|red"),), how())
    with pytest.raises(ValueError, match="num_images: got 2, expected 1"):
        Grid(pipeline, PROMPT, (axis_of("seed=1"),), How(num_images=2))
    with pytest.raises(ValueError, match="styles: got none"):
        style_sheet(pipeline, PROMPT, [])
