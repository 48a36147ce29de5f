"""What a training will need: bytes counted on the meta device are those that a real pass keeps."""

import pytest
import torch

from raphael.base.config.preset import load_preset
from raphael.net.moe.unet import RaphaelUNet
from raphael.summary import need
from raphael.summary.model import num_parameters


@pytest.fixture(scope="module")
def preset():
    return load_preset("tiny")


@pytest.fixture(scope="module")
def model(preset):
    return need.measured(preset, (64, 64), 1000)


def test_what_is_kept_on_the_meta_device_is_what_a_real_pass_keeps(preset, model):
    """One image's, by the storages that autograd holds; routes differ with the weights, so not to the byte."""
    torch.manual_seed(0)
    real = need.kept_bytes(RaphaelUNet(preset.unet).train(), preset, (64, 64))
    assert model.kept > 1e6 and real / model.kept == pytest.approx(1, abs=0.25)


def test_twice_the_area_keeps_about_twice_the_bytes(preset, model):
    assert need.measured(preset, (64, 128), 0).kept / model.kept == pytest.approx(2, abs=0.35)


def test_memory_is_the_sum_of_what_each_purpose_takes(preset, model):
    setup = need.Setup(4, 500, "adamw", 2, False, False)
    memory = need.memory_bytes(model, setup, "cpu")
    assert memory["weights"] == 4 * num_parameters(RaphaelUNet(preset.unet)) == 4 * model.parameters
    assert memory["gradients"] == 2000 and memory["moments of adamw"] == 4000 and memory["EMA weights"] == 4000
    assert memory["text encoder and autoencoder"] == 4000 and memory["kept for the backward pass"] == 4 * model.kept


@pytest.mark.parametrize("change", [{"bf16": True}, {"recompute": True}, {"images": 1}, {"optimizer": "muon"}])
def test_what_saves_memory_saves_it(model, change):
    plain = {"images": 4, "trained": 500, "optimizer": "adamw", "emas": 1, "bf16": False, "recompute": False}
    whole, less = (
        sum(need.memory_bytes(model, need.Setup(**told), "cuda").values()) for told in (plain, {**plain, **change})
    )
    assert less < whole


def test_a_step_takes_longer_than_a_forward_and_both_take_time(preset, model):
    step_s, forward_s = need.seconds_per_image(model, 2, torch.device("cpu"))
    assert step_s > forward_s > 0
