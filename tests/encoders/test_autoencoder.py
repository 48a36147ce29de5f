import dataclasses
import json

import numpy as np
import pytest
import torch

from raphael.base.config.params import load_config
from raphael.base.stage import file_sha256
from raphael.encoders import autoencoder as ae
from raphael.encoders.pretrained import PretrainedError, write_pointer


@pytest.fixture(scope="module")
def settings(project):
    config = load_config(project / "params.yaml").autoencoder
    return dataclasses.replace(config, latent_channels=4, channels=(8, 8, 8), norm_groups=4)


@pytest.fixture(scope="module")
def small(settings):
    torch.manual_seed(0)
    autoencoder = ae.build_autoencoder(settings).eval()
    autoencoder.set_scaling(0.5, 0.25)
    return autoencoder


def pictures(count=2, height=16, width=24):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def digests(folder):
    return {path.name: file_sha256(path) for path in folder.iterdir()}


def test_moments_and_images_have_the_shapes_that_the_contract_names(small):
    moments = small.encode_moments(pictures())
    assert moments.shape == (2, 8, 4, 6)
    latents = small.latents_from_moments(moments)
    torch.testing.assert_close(latents, (moments[:, :4] - 0.25) * 0.5)
    decoded = small.decode(latents)
    assert decoded.shape == (2, 3, 16, 24) and decoded.abs().max() <= 1


def test_decode_undoes_the_scaling(small):
    moments = small.encode_moments(pictures())
    raw = small.decode_raw(moments[:, :4]).clamp(-1, 1)
    torch.testing.assert_close(small.decode(small.latents_from_moments(moments)), raw, atol=1e-5, rtol=1e-4)


def test_moments_are_what_diffusers_calls_the_posterior(small):
    posterior = small.network.encode(pictures()).latent_dist
    mean, log_variance = small.encode_moments(pictures()).chunk(2, dim=1)
    torch.testing.assert_close(mean, posterior.mode())
    torch.testing.assert_close(log_variance.clamp(-30, 20).exp(), posterior.var)


def test_a_saved_autoencoder_comes_back_with_its_scaling_and_as_a_diffusers_folder(small, tmp_path):
    from diffusers import AutoencoderKL

    small.save(tmp_path / "a")
    small.save(tmp_path / "b")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    again = ae.load_autoencoder(tmp_path / "a")
    assert (again.scaling_factor, again.shift, again.scaling_known) == (0.5, 0.25, True)
    torch.testing.assert_close(again.encode_moments(pictures()), small.encode_moments(pictures()))
    assert AutoencoderKL.from_pretrained(tmp_path / "a").config.scaling_factor == 0.5
    again.save(tmp_path / "c")  # no trace of where it was loaded from
    assert digests(tmp_path / "c") == digests(tmp_path / "a")


def test_a_pointer_folder_stands_for_another_one_with_its_own_scaling(small, tmp_path, monkeypatch):
    monkeypatch.setenv("RAPHAEL_ALLOW_REMOTE", "1")
    small.save(tmp_path / "real")
    write_pointer(tmp_path / "pointer", str(tmp_path / "real"), {"scaling_factor": 2.0, "shift": 0.5})
    again = ae.load_autoencoder(tmp_path / "pointer")
    assert (again.scaling_factor, again.shift) == (2.0, 0.5)


def test_measured_scaling_gives_latents_of_mean_zero_and_deviation_one():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(64, 4, 16, 16, generator=generator) * 3 + 2
    moments = torch.cat([mean, torch.full_like(mean, 0.7)], dim=1)
    factor, shift = ae.measure_scaling(moments.split(10))
    noise = torch.randn(mean.shape, generator=generator)
    drawn = (mean + np.exp(0.35) * noise - shift) * factor
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.02


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 3, 4, 4)
    values = ae.psnr(images, images + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1))
    torch.testing.assert_close(values, torch.tensor([20.0, 40.0], dtype=torch.float64), atol=1e-4, rtol=0)


def test_images_of_a_wrong_size_are_refused_with_what_was_expected(small):
    with pytest.raises(ValueError, match="multiples of 4"):
        small.encode_moments(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match=r"expected \(B, 4, h, w\)"):
        small.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="finite"):
        small.set_scaling(float("nan"), 0.0)


@pytest.mark.parametrize("spec", ["./nowhere", "/nowhere/at/all", "nobody/no-such-autoencoder"])
def test_an_absent_autoencoder_is_one_line_that_says_what_to_put_where(spec, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PretrainedError) as caught:
        ae.load_autoencoder(spec)
    message = str(caught.value)
    assert "\n" not in message and spec in message and "diffusion_pytorch_model.safetensors" in message


def test_a_folder_of_something_else_or_with_damaged_weights_is_one_line(small, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(PretrainedError, match="UNet2DModel, expected AutoencoderKL"):
        ae.load_autoencoder(tmp_path)
    small.save(tmp_path / "kl")
    weights = tmp_path / "kl" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PretrainedError) as caught:
        ae.load_autoencoder(tmp_path / "kl")
    assert "\n" not in str(caught.value)


def test_taef2_restores_real_photographs_at_26_to_36_db(shared_data, tmp_path):
    from PIL import Image

    from data_pipeline.common.images import fit
    from raphael.objectives.autoencoding import to_network_range

    tiny = ae.load_autoencoder(shared_data / "weights/taesd_family")
    assert (tiny.latent_channels, tiny.downsampling, tiny.scaling_known) == (32, 8, False)
    files = sorted((shared_data / "coco/val2017").glob("*.jpg"))[::34]
    images = to_network_range(torch.from_numpy(np.stack([fit(Image.open(file), 192, 192) for file in files])))
    moments = tiny.encode_moments(images)
    assert torch.equal(moments[:, 32:], torch.full_like(moments[:, 32:], -30.0))
    tiny.set_scaling(*ae.measure_scaling([moments]))
    latents = tiny.latents_from_moments(moments)
    assert abs(latents.std() - 1) < 0.01
    values = ae.psnr(images, tiny.decode(latents))
    assert 26 <= values.mean() <= 36, values
    tiny.save(tmp_path / "copy")
    again = ae.load_autoencoder(tmp_path / "copy")
    assert (again.scaling_factor, again.shift) == (tiny.scaling_factor, tiny.shift)
    torch.testing.assert_close(again.encode_moments(images[:1]), moments[:1], atol=1e-5, rtol=1e-5)


def test_taef2_names_the_missing_file(tmp_path):
    from raphael.encoders.taesd import TinyNetwork, save_tiny

    save_tiny(TinyNetwork(), tmp_path)
    (tmp_path / "taef2_decoder.pth").unlink()
    with pytest.raises(PretrainedError, match="taef2_decoder.pth"):
        ae.load_autoencoder(tmp_path)


def test_the_autoencoder_of_pixels_gives_back_the_image_and_trains_nothing(tmp_path):
    pixels, images = ae.load_autoencoder("pixels"), pictures()
    moments = pixels.encode_moments(images)
    assert moments.shape == (2, 6, 16, 24) and torch.equal(moments[:, :3], images)
    drawn = pixels.latents_from_moments(moments, torch.ones_like(images))
    torch.testing.assert_close(drawn, images, atol=1e-6, rtol=0)  # a draw is the mean
    assert torch.equal(pixels.latents_from_moments(moments), images)
    assert torch.equal(pixels.decode(images * 2), (images * 2).clamp(-1, 1))
    assert not list(pixels.parameters()) and pixels.scaling_known and pixels.device.type == "cpu"
    pixels.save(tmp_path / "a")
    assert ae.load_autoencoder(tmp_path / "a").facts() == pixels.facts()
    write_pointer(tmp_path, "pixels", {})
    assert ae.load_autoencoder(tmp_path).is_pixels
    with pytest.raises(ValueError, match="got pixels, expected an AutoencoderKL"):
        _ = pixels.last_layer


def test_pixels_are_brought_to_a_size_by_the_area_that_each_covers():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 8, 3), np.uint8)
    latents = ae.encode_images(ae.load_autoencoder("pixels"), images, (4, 4))
    means = images.astype(float).reshape(3, 4, 2, 4, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    assert (
        latents.shape == (3, 3, 4, 4) and np.abs((latents.numpy() + 1) * 127.5 - means).max() <= 1.01
    )  # rounded along each axis
