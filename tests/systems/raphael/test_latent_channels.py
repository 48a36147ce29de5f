"""Autoencoders of other latents than four channels: kl-f8's kin of sixteen, trained on and generated with."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from truth.training_workspace import write_workspace

from raphael.base.config.params import load_config
from raphael.base.stage import StageError
from raphael.base.strict import ConfigError
from raphael.encoders.autoencoder import load_autoencoder
from raphael.generate.pipeline import RaphaelPipeline
from raphael.systems.export import finished, write_export
from raphael.systems.job import Folders, TrainingJob
from raphael.systems.raphael.training import check_fit
from raphael.systems.worker import train_part
from raphael.train.loop import World

LOOP = {
    "num_images": 16, "batch_size": 8, "warmup_images": 0, "log_every_images": 8, "checkpoint_every_images": 16,
    "sample_every_images": 0,
}  # fmt: skip
SIXTEEN = {"autoencoder": {"latent_channels": 16}, "model": {"settings": {"unet": {"latent_channels": 16}}}}


def test_a_diffusers_folder_of_sixteen_channels_without_quantisation_layers_is_read_as_by_diffusers(tmp_path):
    """As Stable Diffusion 3's and Flux' are: no quant_conv, a shift beside the factor."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    theirs = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=16, norm_num_groups=4,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "vae")
    ours = load_autoencoder(tmp_path / "vae")
    assert (ours.latent_channels, ours.downsampling) == (16, 8)
    assert (ours.scaling_factor, ours.shift) == (1.5305, 0.0609)
    images = torch.rand(2, 3, 32, 16) * 2 - 1
    with torch.no_grad():
        mean = theirs.encode(images).latent_dist.mode()
        latents = ours.latents_from_moments(ours.encode_moments(images))
        assert torch.equal(latents, (mean - 0.0609) * 1.5305) and latents.shape == (2, 16, 4, 2)
        assert torch.allclose(ours.decode(latents), theirs.decode(mean).sample.clamp(-1, 1), atol=1e-5)
    ours.save(tmp_path / "again")
    assert torch.equal(load_autoencoder(tmp_path / "again").encode_moments(images), ours.encode_moments(images))


def test_a_model_is_trained_on_them_and_generates(tmp_path):
    config = write_workspace(tmp_path / "workspace", {**SIXTEEN, "train": {"num_workers": 0, "loop": LOOP}})
    assert config.model.load().unet.latent_channels == 16
    folders = Folders.of(tmp_path / "workspace", tmp_path / "work")
    folders.work.mkdir()
    train_part(TrainingJob(config, folders), World())
    write_export(config, folders, finished(config, folders))
    pipeline = RaphaelPipeline.from_pretrained(folders.work / "export")
    result = pipeline("a circle", num_inference_steps=2, output_type="latent")
    assert result.images.shape[1] == 16
    assert np.asarray(pipeline("a circle", num_inference_steps=2).images[0]).shape == (32, 32, 3)


def test_latents_that_do_not_fit_say_which_setting_and_no_other_size_is_set_there(tmp_path):
    config = write_workspace(tmp_path, SIXTEEN)
    from raphael.base.records import Records

    narrow = replace(config, model=replace(config.model, settings={}))
    with pytest.raises(StageError, match=r"got 4, but the latents have channels 16; .*model.settings: \{unet: "):
        check_fit(narrow, Records(tmp_path / "data/records"), config.model.load().unet.context_dim)
    settings = yaml.safe_load((tmp_path / "params.yaml").read_text())
    settings["model"]["settings"] = {"unet": {"channels": [8]}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match="model.settings: got unet.channels, expected unet.latent_channels or none"):
        load_config(tmp_path / "params.yaml")
