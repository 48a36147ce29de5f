import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from raphael.base.config.params import load_config
from raphael.base.randomness import SampleRng
from raphael.encoders.autoencoder import build_autoencoder
from raphael.objectives.autoencoding import AutoencodingObjective, gradient_l1, kl_divergence, to_network_range


def batch(count=4, side=16):
    return {"image": torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8))}


def rng(count=4):
    return SampleRng(0, 0, np.arange(count))


def test_kl_against_torch_distributions():
    moments = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, log_variance = moments.chunk(2, dim=1)
    normal = torch.distributions.Normal
    truth = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(kl_divergence(moments), truth)


def test_gradient_loss_against_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, 1, 3, 4, generator=generator) for _ in range(2))
    e = (a - b)[0, 0]
    across = [abs(float(e[y, x + 1] - e[y, x])) for y in range(3) for x in range(3)]
    down = [abs(float(e[y + 1, x] - e[y, x])) for y in range(2) for x in range(4)]
    truth = 0.5 * (sum(across) / len(across) + sum(down) / len(down))
    assert float(gradient_l1(a, b)) == pytest.approx(truth, abs=1e-6)


def test_the_network_sees_minus_one_to_one():
    pixels = torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)
    assert to_network_range(pixels).flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6])
    with pytest.raises(ValueError, match="expected uint8"):
        to_network_range(pixels.float())


class Perfect(nn.Module):
    """Remembers the image: its reconstruction is exact, its posterior standard normal."""

    def encode_moments(self, images):
        self.images = images
        return torch.zeros(len(images), 8, 4, 4)

    def decode_raw(self, latents):
        return self.images


def test_a_perfect_autoencoder_has_no_loss():
    values = AutoencodingObjective(Perfect(), 1.0, 1.0)(batch(), rng())
    assert float(values["loss"]) == 0 and float(values["psnr"]) > 100


@pytest.fixture(scope="module")
def settings(project):
    config = load_config(project / "params.yaml").autoencoder
    return dataclasses.replace(config, latent_channels=4, channels=(8, 8, 8), norm_groups=4)


def test_the_loss_is_the_weighted_sum_of_its_parts_and_a_mean_over_the_batch(settings):
    torch.manual_seed(0)
    objective = AutoencodingObjective(build_autoencoder(settings), 0.01, 0.5)
    values = objective(batch(), rng())
    total = values["l1"] + 0.5 * values["gradient"] + 0.01 * values["kl"]
    torch.testing.assert_close(values["loss"].detach(), total)
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        halves.append(objective({"image": batch()["image"][part]}, SampleRng(0, 0, np.arange(4)[part]))["loss"])
    torch.testing.assert_close(torch.stack(halves).mean(), values["loss"])  # noise belongs to the sample


class Seen(Perfect):
    """Perfect, and keeps what it was shown."""

    def encode_moments(self, images):
        super().encode_moments(images)
        return torch.zeros(len(images), 8, images.shape[2] // 4, images.shape[3] // 4)


def test_crops_are_parts_of_their_images_and_belong_to_the_sample():
    whole = to_network_range(batch()["image"])

    def crops(part):
        seen = Seen()
        objective = AutoencodingObjective(seen, 0.0, 0.0, crop_px=8)
        objective({"image": batch()["image"][part]}, SampleRng(0, 3, np.arange(4)[part]))
        return seen.images

    found = crops(slice(0, 4))
    assert found.shape == (4, 3, 8, 8)
    for picture, crop in zip(whole, found, strict=True):
        places = picture.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert (places == crop).flatten(1).all(dim=1).sum() == 1
    torch.testing.assert_close(crops(slice(2, 4)), found[2:])


def test_a_few_steps_lower_the_loss_also_in_bfloat16(settings):
    torch.manual_seed(0)
    autoencoder = build_autoencoder(settings)
    objective = AutoencodingObjective(autoencoder, 1e-6, 0.5)
    optimizer = torch.optim.AdamW(objective.parameters(), 5e-3)
    pixels = {"image": torch.full((4, 16, 16, 3), 200, dtype=torch.uint8)}
    losses = []
    for step in range(20):
        with torch.autocast("cpu", torch.bfloat16, enabled=step % 2 == 1):
            values = objective(pixels, rng())
        assert values["loss"].dtype == torch.float32
        optimizer.zero_grad()
        values["loss"].backward()
        optimizer.step()
        losses.append(float(values["loss"].detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert all(parameter.grad is not None for parameter in objective.parameters())
