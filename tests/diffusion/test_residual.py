"""The prediction of an upsampler: EDM's preconditioning about the small picture that it is told."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from truth.closed_form_diffusion import starts

from raphael.base.config.preset import DiffusionConfig
from raphael.base.config.sampling import Sampling
from raphael.base.randomness import SampleRng
from raphael.base.records import PIXELS
from raphael.base.strict import load, to_dict
from raphael.diffusion.cascade import Upsampler, augmented, enlarged, shrunk, with_picture
from raphael.diffusion.denoiser import NetworkDenoiser
from raphael.diffusion.guidance import ClassifierFreeGuidance
from raphael.diffusion.image_noise import ImageNoise
from raphael.diffusion.noise import noise_of
from raphael.diffusion.prediction import ENLARGED_NOISE, Edm, Residual, about, prediction_of, training_pair
from raphael.diffusion.sampling import Order
from raphael.net.condition import Condition
from raphael.objectives.plain import Enlarging, PlainDenoising

CONFIG = DiffusionConfig(
    1000, "continuous_cosine", 1e-4, 0.02, "residual", zero_terminal_snr=True, sigma_data=0.7, sigma_residual=0.09
)
TIMES = torch.tensor([0.0, 1.0, 10.0, 400.0, 800.0, 998.0, 999.0], dtype=torch.float64)
LEVELS = (0.0, 0.05, 0.3, 0.9, 1.0)


def told(z: torch.Tensor, level: float) -> Condition:
    return Condition(picture=z, level=torch.full((len(z),), level * 999, dtype=torch.float64))


def parts(level: float) -> list[torch.Tensor]:
    """x_0, z and eps, (7, 1, 1, 1) each, as the coefficients of four independent numbers of variance 1: the enlarged
    picture, what it lacks, the noise of augmentation, and eps. x_0 and z share the first."""
    alpha, sigma = math.cos(level * math.pi / 2), math.sin(level * math.pi / 2)
    x0 = (CONFIG.sigma_data, CONFIG.sigma_residual, 0.0, 0.0)
    z = (alpha * CONFIG.sigma_data, 0.0, sigma * ENLARGED_NOISE**0.5, 0.0)
    return [
        torch.tensor(row, dtype=torch.float64).repeat(len(TIMES), 1).T[:, :, None, None, None]
        for row in (x0, z, (0.0, 0.0, 0.0, 1.0))
    ]


@pytest.mark.parametrize("level", LEVELS)
def test_input_and_target_have_variance_one_at_every_noise_and_level(level: float) -> None:
    """Of Gaussian x_0 = u + r and z = alpha u + sigma e: a linear form's variance is the sum of its squares."""
    noise, kind = noise_of(CONFIG), prediction_of(CONFIG)
    pairs = [
        training_pair(about(kind, told(z, level)), noise, x0, eps, TIMES)
        for x0, z, eps in zip(*parts(level), strict=True)
    ]
    one = torch.ones(len(TIMES), 1, 1, 1, dtype=torch.float64)
    for forms in zip(*pairs, strict=True):
        torch.testing.assert_close(sum(form**2 for form in forms), one, rtol=0, atol=1e-9)


@pytest.mark.parametrize("level", LEVELS)
def test_a_network_that_returns_0_is_the_best_linear_estimate_from_the_noised_image_and_the_picture(level) -> None:
    """The conditional mean of a Gaussian, by solving the covariance of what is seen."""
    noise, kind, unseen = noise_of(CONFIG), prediction_of(CONFIG), starts(len(TIMES), 1)
    x0, z, eps = (np.array(part.squeeze()[:, 0]) for part in parts(level))
    picture, x_vp = starts(len(TIMES), 2), starts(len(TIMES), 3)
    signals, spreads = noise.roots(TIMES, picture)
    sigma = (spreads / signals).view(-1, 1, 1, 1)
    scale = torch.where(torch.isinf(sigma), 1.0, signals)
    ours = about(kind, told(picture, level)).estimate(torch.zeros_like(unseen), x_vp / scale, sigma)
    for row, (signal, spread) in enumerate(zip(signals.flatten().tolist(), spreads.flatten().tolist(), strict=True)):
        seen = np.stack([signal * x0 + spread * eps, z])
        weights = np.linalg.lstsq(seen @ seen.T, seen @ x0, rcond=None)[0]
        by_hand = weights[0] * x_vp[row] + weights[1] * picture[row]
        torch.testing.assert_close(ours[row], by_hand, rtol=0, atol=1e-7)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_network_that_returns_its_target_is_a_denoiser_that_returns_x0(guidance: float) -> None:
    """At every noise, in both branches of guidance, which see one picture."""
    noise, kind = noise_of(CONFIG), prediction_of(CONFIG)
    x0, eps, z = (starts(len(TIMES), stream) for stream in (2, 3, 4))
    condition = told(z, 0.2)
    given, target = training_pair(about(kind, condition), noise, x0, eps, TIMES)

    def network(x, t, cond, collect=False):
        torch.testing.assert_close(x[: len(given)], given, rtol=0, atol=1e-9)
        return SimpleNamespace(prediction=target.repeat(len(x) // len(target), 1, 1, 1))

    signal, spread = noise.roots(TIMES, x0)
    sigma = (spread / signal).flatten()
    x = torch.where(signal == 0, eps, x0 + spread / signal * eps)
    denoiser = ClassifierFreeGuidance(NetworkDenoiser(network, noise, kind), guidance, condition)
    torch.testing.assert_close(denoiser(x, sigma, condition), x0, rtol=0, atol=1e-8)


def test_at_level_0_the_picture_is_believed_and_at_level_1_it_says_nothing() -> None:
    z = starts(2, 1)
    clean, noise = (about(prediction_of(CONFIG), told(z, level)) for level in (0.0, 1.0))
    assert torch.equal(clean.mean, z) and clean.deviation.flatten().tolist() == pytest.approx([0.09] * 2)
    assert noise.mean.abs().max() == 0 and noise.deviation.flatten().tolist() == pytest.approx(
        [math.hypot(0.7, 0.09)] * 2
    )
    untold = about(prediction_of(CONFIG), Condition(picture=z))
    assert torch.equal(untold.mean, z), "a picture without a level has no noise"


def test_the_noise_that_enlarging_leaves_is_the_sum_of_its_squared_weights() -> None:
    deltas = torch.eye(36, dtype=torch.float64).view(36, 1, 6, 6)
    left = enlarged(deltas, 2).square().sum(0)[0]
    torch.testing.assert_close(left[2:-2, 2:-2], torch.full((8, 8), ENLARGED_NOISE, dtype=torch.float64))


def test_without_noise_on_the_picture_it_is_edm_of_what_the_picture_lacks() -> None:
    noise, x0, eps, z = noise_of(CONFIG), starts(7, 1), starts(7, 2), starts(7, 3)
    ours = training_pair(about(prediction_of(CONFIG), told(z, 0.0)), noise, x0, eps, TIMES)
    edm = training_pair(Edm(CONFIG.sigma_residual), noise, x0 - z, eps, TIMES)
    for one, other in zip(ours, edm, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_an_error_of_the_output_is_an_error_of_x0_in_the_stated_ratio() -> None:
    sigma, output, x = torch.tensor([0.01, 0.3, 1.0, 7.0, 100.0], dtype=torch.float64), starts(5, 1), starts(5, 2)
    kind = about(prediction_of(CONFIG), told(starts(5, 3), 0.3))
    off = kind.estimate(output + 0.25, x, sigma.view(-1, 1, 1, 1)) - kind.estimate(output, x, sigma.view(-1, 1, 1, 1))
    torch.testing.assert_close(0.25**2 / off.square().mean((1, 2, 3)), kind.error_of_x0(sigma**-2))


class Zero(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, condition, collect=False):
        return SimpleNamespace(prediction=0.0 * x)


def test_an_upsampler_that_has_learned_nothing_enlarges_bilinearly() -> None:
    low = starts(2, 1).float().clamp(-1, 1)[:, :3]
    upsampler = Upsampler(Zero(), noise_of(CONFIG), prediction_of(CONFIG), 2)
    order = Order(Condition(), Condition(), ImageNoise([(7, 0), (7, 1)], tuple(low.shape[1:])), Sampling("ddim"))
    for steps in (1, 4):
        settings = Sampling("ddim", upsampler_steps=steps, augmentation=0.0)
        made = upsampler(low, Order(order.cond, order.null, order.noise, settings))
        off = (made - enlarged(low, 2)).square().mean().sqrt()
        assert off < 1e-6 if steps == 1 else off < CONFIG.sigma_residual, "later steps leave of the noise what is data"


def test_the_loss_of_a_network_that_returns_0_is_the_error_of_the_linear_estimate_in_its_own_units() -> None:
    """Written out, at a level of augmentation that is at most the highest."""
    pixels = torch.randint(0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rng, noise = SampleRng(0, 0, range(6)), noise_of(CONFIG)
    goal = Enlarging(Zero(), noise, prediction_of(CONFIG), lambda batch, dropped: Condition(), highest=0.5)
    loss = goal({PIXELS: pixels}, rng)["loss"]
    x0 = pixels.double() / 127.5 - 1
    level, t = 0.5 * rng.uniform("augmentation level").double(), rng.uniform("timestep").double() * 999
    eps, extra = (rng.normal(*args).double() for args in (("noise", (3, 8, 8)), ("augmentation noise", (3, 4, 4))))
    condition = with_picture(Condition(), augmented(shrunk(x0, 2), extra, level), level, 2, 1000)
    kind, (signal, spread) = about(prediction_of(CONFIG), condition), noise.roots(t, x0)
    sigma = spread / signal
    off = x0 - kind.estimate(torch.zeros_like(x0), x0 + sigma * eps, sigma)
    ratio = kind.error_of_x0(sigma.flatten() ** -2).view(-1, 1, 1, 1)
    assert loss.item() == pytest.approx((off.square() * ratio).mean().item(), rel=1e-4)


def test_a_network_without_a_picture_is_told_that_it_is_no_upsampler() -> None:
    kind = prediction_of(CONFIG)
    pixels = {PIXELS: torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="prediction residual: got no picture, expected the small one"):
        PlainDenoising(Zero(), noise_of(CONFIG), kind, lambda batch, dropped: Condition())(
            pixels, SampleRng(0, 0, range(2))
        )
    with pytest.raises(ValueError, match="prediction residual: got a network that is told no picture"):
        training_pair(kind, noise_of(CONFIG), starts(1, 1), starts(1, 2), TIMES[:1])


def test_checkpoints_of_before_keep_their_settings() -> None:
    before = DiffusionConfig(1000, "linear", 1e-4, 0.02, "v", True)
    assert not {"sigma_data", "sigma_residual"} & set(to_dict(before))
    assert load(DiffusionConfig, to_dict(CONFIG), "a file") == CONFIG
    assert prediction_of(CONFIG) == Residual(0.7, 0.09, 1000)
