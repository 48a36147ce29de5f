import json

import pytest
import torch
from truth.image_workspace import SMALL, small_preset, write_params, write_workspace

from data_pipeline.autoencoder import stage as fit_autoencoder
from raphael.base.config.params import load_config
from raphael.base.stage import Stage, StageError
from raphael.base.strict import ConfigError
from raphael.encoders.autoencoder import load_autoencoder
from raphael.objectives.perceptual import Lpips

OFF = "off: no autoencoder.perceptual.backbone is given"


@pytest.fixture
def workspace(tmp_path, project, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_workspace(tmp_path, project, 8, **SMALL)

    def trained(**losses):
        sections = {**SMALL, "autoencoder": {**SMALL.get("autoencoder", {}), **losses}}
        write_params(tmp_path, project, **sections, model={"preset": small_preset(tmp_path, project)})
        fit_autoencoder.run(load_config(tmp_path / "params.yaml"), Stage("autoencoder", tmp_path))
        return json.loads((tmp_path / "reports/autoencoder.json").read_text())

    return trained


def lpips_files(folder):
    """A backbone and heads with random weights, in the form of the published files."""
    torch.manual_seed(0)
    network = Lpips()
    convolutions = [layer for part in network.slices for layer in part if hasattr(layer, "bias")]
    weights = {}
    for number, layer in enumerate(convolutions):
        weights |= {f"features.{number}.weight": layer.weight, f"features.{number}.bias": layer.bias}
    torch.save({name: value.detach() for name, value in weights.items()}, folder / "vgg16.pth")
    heads = {f"lin{k}.model.1.weight": torch.rand(1, len(h), 1, 1) for k, h in enumerate(network.heads)}
    torch.save(heads, folder / "vgg.pth")
    return {"weight": 1.0, "backbone": str(folder / "vgg16.pth"), "heads": str(folder / "vgg.pth")}


def test_an_autoencoder_is_trained_with_lpips_and_a_discriminator_and_saved_without_them(workspace, tmp_path):
    told = workspace()
    assert told["lpips"] == OFF and "train/perceptual" not in told["history"][-1]
    plain = load_autoencoder(tmp_path / "models/autoencoder").state_dict()
    adversarial = {"weight": 0.5, "start_images": 8, "channels": 4, "layers": 2}
    told = workspace(perceptual=lpips_files(tmp_path), adversarial=adversarial, crop_px=0)
    last = told["history"][-1]
    assert told["lpips"] == "on" and last["train/perceptual"] > 0
    assert {"train/generator", "train/discriminator", "train/adversarial_balance"} <= last.keys()
    other = load_autoencoder(tmp_path / "models/autoencoder").state_dict()
    assert other.keys() == plain.keys() and any(not torch.equal(plain[name], other[name]) for name in plain)


def test_half_of_lpips_or_a_file_that_is_none_of_its_is_refused(workspace, tmp_path):
    files = lpips_files(tmp_path)
    with pytest.raises(ConfigError, match="heads: got nothing with a backbone file, expected both files, or neither"):
        workspace(perceptual={**files, "heads": ""})
    with pytest.raises(StageError, match=r"autoencoder.perceptual: .*vgg.pth: got no VGG-16"):
        workspace(perceptual={**files, "backbone": files["heads"]})
    assert workspace(perceptual={**files, "weight": 0.0})["lpips"] == "off: autoencoder.perceptual.weight is 0"
