"""What a fine-tuning decides before it starts: what is held out, what fits, and what is too little."""

from __future__ import annotations

import dataclasses

import pytest
from truth.own_images import settings, sidecars
from truth.tiny_raphael import write_pipeline

from flows.finetuning import plan
from raphael.base.config.params import load_config
from raphael.base.config.preset import load_preset
from raphael.base.stage import StageError

ASKED = {"heldout": None, "patience": 5, "sample_every": None}
GB = 1_000_000_000


def looked(used: int) -> plan.Looked:
    return plan.Looked(used, ("a dog", "a cat"), {}, None)


@pytest.mark.parametrize(("used", "held"), [(9, 0), (10, 2), (30, 3), (400, 40), (5000, 64)])
def test_a_tenth_is_held_out_where_there_are_ten(used, held):
    told = plan.measuring(looked(used), 3200, 16, ASKED)
    assert told.get("train.num_heldout", 0) == held
    assert told.get("train.export") == ("best" if held else None) and told.get("train.patience", 0) == (
        5 if held else 0
    )
    assert ("train.sample_prompts" in told) == (used < 10)


@pytest.mark.parametrize(("num_images", "batch"), [(3200, 16), (320, 16), (16, 16), (5000, 24), (640, 8)])
def test_losses_grids_and_checkpoints_come_at_the_same_points_in_whole_batches(num_images, batch):
    told = plan.measuring(looked(30), num_images, batch, ASKED)
    names = ("log", "checkpoint", "sample", "heldout")
    (point,) = {told[f"train.loop.{name}_every_images"] for name in names}
    assert point % batch == 0 and point >= batch and (num_images // point <= 2 * plan.POINTS)


def test_what_is_asked_for_is_done():
    told = plan.measuring(looked(30), 3200, 16, {"heldout": 0, "patience": 5, "sample_every": 0})
    assert "train.num_heldout" not in told and told["train.loop.sample_every_images"] == 0
    told = plan.measuring(looked(5), 3200, 16, {"heldout": 2, "patience": 3, "sample_every": 640})
    assert told["train.num_heldout"] == 2 and told["train.patience"] == 3
    assert told["train.loop.sample_every_images"] == 640


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("model") / "raphael")


@pytest.fixture
def config(project):
    config = load_config(project / "params.yaml")
    return dataclasses.replace(config, device="cpu")


def needed(config, model, gigabytes):
    return plan.need(config, load_preset("tiny"), model, looked(30), gigabytes)


def test_with_room_nothing_is_spared_and_the_line_says_what_it_takes(config, model):
    found = needed(config, model, 80)
    assert found.settings == {} and found.bytes == sum(found.memory.values()) < 80 * GB
    line = found.line()
    assert f"needs {found.bytes / GB:.1f} GB and about " in line and "this machine has 80.0 GB" in line


def test_with_less_room_the_first_thing_that_fits_is_spared(config, model):
    whole = needed(config, model, 80).bytes / GB
    less = needed(config, model, whole / plan.ROOM * 0.99)
    assert less.settings == {"train.parallel.micro_batch": 4} and less.bytes < 0.99 * whole * GB
    assert "to fit: batches in passes of 4" in less.line()


def test_without_room_it_is_one_line_that_says_what_would_do(config, model):
    with pytest.raises(StageError, match=r"got 0.1 GB, expected at least 0\.\d for this model.*weights.*--lora 8"):
        needed(config, model, 0.1)


def test_three_images_are_too_few_and_the_reasons_are_said(project, tmp_path):
    config = settings(project, "folder", tmp_path)
    sidecars(tmp_path, 4)
    (tmp_path / "image_00.txt").unlink()
    with pytest.raises(StageError, match="got 3 images that can be used, expected at least 4.*of 4: 1 no caption"):
        plan.look(config)
    (tmp_path / "image_00.txt").write_text("a word")
    assert plan.look(config).used == 4


def test_what_the_settings_allow_is_used(project, tmp_path):
    sidecars(tmp_path, 5)
    config = settings(project, "folder", tmp_path)
    large = dataclasses.replace(config, picture=dataclasses.replace(config.picture, sizes_px=((96, 96),)))
    with pytest.raises(StageError, match="got 0 images that can be used.*5 smaller than its size"):
        plan.look(large)
    upscaled = dataclasses.replace(large, picture=dataclasses.replace(large.picture, too_small="upscale"))
    assert plan.look(upscaled).used == 5
