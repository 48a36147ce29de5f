"""`raphael model show` of presets of one network: what is printed is there, and whole models stay as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from raphael.base.config.preset import load_preset, preset_names
from raphael.net.plain import PlainBlock
from raphael.net.unet import UNet
from raphael.summary.network import PlainPreset, network_text, networks_in

SMALL = {
    "unet": {
        "latent_channels": 3, "channels": [8, 16], "res_blocks": 1, "attention_levels": [1], "head_dim": 8,
        "norm_groups": 4, "context_dim": 16, "context_length": 5,
    },
    "diffusion": {
        "num_steps": 1000, "schedule": "continuous_cosine", "beta_start": 1.0e-4, "beta_end": 0.02, "prediction": "v",
        "zero_terminal_snr": True,
    },
}  # fmt: skip


def write(folder: Path, **unet) -> str:
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "unet": {**SMALL["unet"], **unet}}))
    return str(file)


def test_a_network_is_shown_with_its_parameters_and_its_encoder_is_not_counted(tmp_path: Path) -> None:
    name = write(tmp_path)
    network = UNet(load_preset(name, PlainPreset).unet, PlainBlock)
    count = sum(parameter.numel() for parameter in network.parameters())
    shown = network_text(name)
    assert f"unet: {count:,} parameters" in shown and "1x3x64x64" in shown
    assert "reads 5 tokens of width 16" in shown
    assert f"{4 * count / 1e9:.2f} GB" in shown


def test_an_upsampler_is_shown_at_the_size_that_it_draws(tmp_path: Path) -> None:
    more = {"stem_channels": 8, "res_blocks": [1, 1], "strides": [2, 2], "picture_channels": 3, "level_embedding": True}
    name = write(tmp_path, **more)
    Path(name).write_text(Path(name).read_text() + "factor: 4\n")
    assert networks_in(name) == [name]
    assert "one image of 256 x 256 px" in network_text(name) and "1x3x256x256" in network_text(name)


def test_a_folder_means_all_its_networks_and_a_whole_model_none() -> None:
    assert networks_in("imagen") == ["imagen/64", "imagen/256", "imagen/1024"]
    assert networks_in("imagen/256") == ["imagen/256"]
    assert not [name for name in preset_names() if networks_in(name)] and networks_in("nothing") == []


@pytest.mark.slow
def test_a_published_size_is_counted_without_memory() -> None:
    assert "unet: 5" in network_text("imagen/256") and torch.get_default_device().type == "cpu"
