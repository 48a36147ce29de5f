"""Cascades: the continuous cosine schedule, noise conditioning augmentation, what an upsampler is told and returns."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from raphael.base.config.preset import DiffusionConfig
from raphael.base.config.sampling import Sampling
from raphael.base.randomness import SampleRng
from raphael.base.records import MOMENTS, PIXELS
from raphael.base.strict import ConfigError, load
from raphael.diffusion.cascade import Upsampler, augmented, enlarged, shrunk, with_picture
from raphael.diffusion.image_noise import FromImage, GeneratorNoise, ImageNoise, StartedFrom
from raphael.diffusion.noise import CosineNoise, noise_of
from raphael.diffusion.prediction import Sample, Velocity
from raphael.diffusion.sampling import Order, Parts, sample_order
from raphael.net.condition import AttentionHooks, Condition
from raphael.objectives.plain import Enlarging, PlainDenoising

COSINE = DiffusionConfig(1000, "continuous_cosine", 1e-4, 0.02, "v", zero_terminal_snr=True)


def theirs(time: torch.Tensor, s: float = 0.008) -> torch.Tensor:
    """imagen-pytorch 2.1.0, alpha_cosine_log_snr, as its source has it; its clamp at 1e-5 touches no time from 0 on."""
    return -torch.log(((torch.cos((time + s) / (1 + s) * math.pi * 0.5) ** -2) - 1).clamp(min=1e-5))


def test_the_log_snr_of_the_schedule_is_imagen_pytorchs() -> None:
    noise, time = noise_of(COSINE), torch.linspace(0, 1, 101, dtype=torch.float64)[:-1]
    torch.testing.assert_close(noise.log_snr(time * 999), theirs(time), rtol=1e-9, atol=1e-9)
    # its figures at time 0, 1/4, 1/2, 3/4, computed once from the formula in twelve digits
    figures = [noise.log_snr(torch.tensor([at * 999.0])).item() for at in (0.0, 0.25, 0.5, 0.75)]
    assert figures == pytest.approx(
        [-2 * math.log(math.tan((t + 0.008) / 1.008 * math.pi / 2)) for t in (0, 0.25, 0.5, 0.75)]
    )
    assert figures[0] == pytest.approx(8.769, abs=1e-3) and abs(figures[2]) < 0.05
    assert noise.log_snr(torch.tensor([999.0])) == -math.inf


def test_it_is_the_discrete_cosine_schedule_between_its_steps() -> None:
    """alpha_bar of arXiv 2102.09672, whose betas are capped at the end and whose first step is normalised away."""
    discrete = noise_of(DiffusionConfig(1000, "cosine", 1e-4, 0.02, "v", zero_terminal_snr=False))
    t = torch.arange(900)
    apart = noise_of(COSINE).alpha_bar_at((t + 1.0) / 1000 * 999) - discrete.alpha_bar[:900]
    assert apart.abs().max() < 2e-4


def test_timestep_inverts_sigma_and_training_times_are_uniform() -> None:
    noise, t = CosineNoise(1000), torch.tensor([0.0, 0.5, 10.0, 500.25, 998.0, 999.0])
    assert (noise.sigma_at(t).diff() > 0).all() and noise.zero_terminal_snr
    torch.testing.assert_close(noise.timestep(noise.sigma_at(t)), t, rtol=1e-6, atol=1e-4)
    assert noise.timestep(torch.tensor([math.inf])) == 999 and noise.timestep(torch.tensor([0.0])) == 0
    torch.testing.assert_close(noise.timesteps(torch.tensor([0.0, 0.25, 0.5])), torch.tensor([0.0, 249.75, 499.5]))
    sigmas = noise.sampling_sigmas(4)
    assert math.isinf(sigmas[0]) and sigmas[-1] == 0 and (sigmas[1:].diff() < 0).all() and len(sigmas) == 5
    torch.testing.assert_close(
        noise.timestep(sigmas[:-1]), torch.tensor([999.0, 749.25, 499.5, 249.75]), rtol=1e-6, atol=1e-3
    )
    with pytest.raises(ValueError, match="steps: got 0"):
        noise.sampling_sigmas(0)
    with pytest.raises(
        ConfigError, match="zero_terminal_snr: got false with schedule continuous_cosine, expected true"
    ):
        load(DiffusionConfig, {**dataclasses.asdict(COSINE), "zero_terminal_snr": False}, "a file")


def images(count: int = 3, side: int = 8, stream: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(stream), dtype=torch.float64)


def test_augmentation_is_the_identity_at_level_0_and_noise_at_level_1() -> None:
    low, eps = images(), images(stream=1)
    ends = augmented(low, eps, torch.tensor([0.0, 1.0, 0.5]))
    assert torch.equal(ends[0], low[0]) and torch.equal(ends[1], eps[1])
    torch.testing.assert_close(ends[2], (low[2] + eps[2]) / 2**0.5)


def test_augmentation_keeps_variance_and_is_add_noise_of_the_schedule() -> None:
    low, eps, level = images(5), images(5, stream=1), torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    schedule = CosineNoise(1000, offset=0.0)
    torch.testing.assert_close(augmented(low, eps, level), schedule.add_noise(low, eps, level.double() * 999))
    angle = level.double() * math.pi / 2
    by_hand = angle.cos()[:, None, None, None] * low + angle.sin()[:, None, None, None] * eps
    torch.testing.assert_close(augmented(low, eps, level), by_hand, rtol=1e-6, atol=1e-7)


def test_shrinking_is_the_mean_of_areas_and_enlarging_goes_through_the_middles_of_pixels() -> None:
    large = images(side=8)
    small = shrunk(large, 2)
    torch.testing.assert_close(small[0, 0, 1, 2], large[0, 0, 2:4, 4:6].mean())
    assert shrunk(large, 1) is large
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 3, 4, 4)
    assert enlarged(ramp, 2)[0, 0, 0].tolist() == [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]
    torch.testing.assert_close(shrunk(enlarged(ramp, 2), 2)[..., 1:3], ramp[..., 1:3])


class Knowing(nn.Module):
    """Returns what it is given to return, and keeps what it was told."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.told, self.anchor = answer, [], nn.Parameter(torch.zeros(()))

    def forward(self, x, t, condition, collect=False):
        self.told.append((x, t, condition))
        return SimpleNamespace(prediction=self.answer(x, t, condition))


def order(low: torch.Tensor, settings: Sampling, **more) -> Order:
    count = len(low)
    cond = Condition(torch.ones(count, 2, 4), torch.ones(count, 2, dtype=torch.bool), **more)
    null = Condition(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.bool))
    seeds = [(7, index) for index in range(count)]
    return Order(cond, null, ImageNoise(seeds, tuple(low.shape[1:])), settings)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler_ancestral", "heun"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_upsampler_of_a_network_that_returns_the_truth_returns_the_truth(sampler, guidance) -> None:
    truth = images(2, 16).float().clamp(-1, 1)
    network = Knowing(lambda x, t, condition: truth.repeat(len(x) // 2, 1, 1, 1))
    upsampler = Upsampler(network, noise_of(COSINE), Sample(), 2)
    settings = Sampling(sampler, upsampler_steps=3, upsampler_guidance=guidance, threshold="static")
    made = upsampler(shrunk(truth, 2), order(shrunk(truth, 2), settings))
    torch.testing.assert_close(made, truth, rtol=1e-5, atol=1e-5)


def test_it_is_told_the_augmented_picture_and_its_level_in_both_branches_of_guidance() -> None:
    low = images(2, 4).float().clamp(-1, 1)
    network = Knowing(lambda x, t, condition: torch.zeros_like(x))
    upsampler = Upsampler(network, noise_of(COSINE), Velocity(), 2)
    settings = Sampling(
        "ddim", steps=9, guidance_scale=7.0, upsampler_steps=2, upsampler_guidance=3.0, augmentation=0.25
    )
    asked = order(low, settings, hooks=AttentionHooks(edit=lambda call, map: map))
    assert upsampler(low, asked).shape == (2, 3, 8, 8)
    assert len(network.told) == 2, "its own number of steps"
    x, t, condition = network.told[0]
    assert x.shape == (4, 3, 8, 8) and condition.hooks is None
    assert condition.level.tolist() == [0.25 * 999] * 4
    eps = asked.noise.another("augmentation", (3, 4, 4)).start()
    picture = enlarged(augmented(low, eps, torch.full((2,), 0.25)), 2)
    torch.testing.assert_close(condition.picture, picture.repeat(2, 1, 1, 1))
    assert condition.mask[:2].all() and not condition.mask[2:].any(), "the text alone is what guidance leaves out"


def test_the_noise_of_an_image_is_that_of_its_own_seed_and_of_each_network_apart() -> None:
    noise, one = ImageNoise([(1, 0), (1, 5)], (3, 4, 4)), ImageNoise([(1, 5)], (3, 4, 4))
    large = noise.another("upsampler", (3, 8, 8))
    assert large.start().shape == (2, 3, 8, 8)
    assert torch.equal(large.start()[1:], one.another("upsampler", (3, 8, 8)).start())
    same = noise.another("upsampler", (3, 4, 4))
    assert (same.start() - noise.start()).abs().min() > 0 and (same(0) - noise(0)).abs().min() > 0
    assert torch.equal(StartedFrom(noise, noise.start()).another("a", (2,)).start(), noise.another("a", (2,)).start())
    assert torch.equal(FromImage(noise, noise.start(), 1.0, 2).another("a", (2,))(0), noise.another("a", (2,))(0))
    drawn = GeneratorNoise(torch.Generator().manual_seed(0), 2, (3, 4, 4))
    assert drawn.another("a", (3, 8, 8)).start().shape == (2, 3, 8, 8) and drawn.start().shape == (2, 3, 4, 4)


def test_a_cascade_ends_with_its_last_network_or_with_the_base_where_that_is_asked_for() -> None:
    base = Knowing(lambda x, t, condition: torch.zeros_like(x))
    parts = Parts(base, noise_of(COSINE), Velocity(), lambda texts: Condition(), lambda x: x, (3, 4, 4))
    cascade = dataclasses.replace(parts, then=lambda low, order: enlarged(low, 2))
    plain, low = Sampling("ddim", steps=2, guidance_scale=1.0), images(2, 4)
    whole = sample_order(cascade, order(low, plain))
    first = sample_order(cascade, order(low, dataclasses.replace(plain, until="base")))
    assert first.shape == (2, 3, 4, 4) and torch.equal(whole, enlarged(first, 2))
    assert torch.equal(first, sample_order(parts, order(low, plain)))


@pytest.mark.parametrize("change", [{"until": "base"}, {"augmentation": 0.5}, {"upsampler_steps": 3}])
def test_an_option_of_cascades_is_refused_by_a_model_of_one_network(change) -> None:
    base = Knowing(lambda x, t, condition: torch.zeros_like(x))
    parts = Parts(base, noise_of(COSINE), Velocity(), lambda texts: Condition(), lambda x: x, (3, 4, 4))
    with pytest.raises(ValueError, match=f"{next(iter(change))}: got .*: the model has no upsampler"):
        sample_order(parts, order(images(2, 4), Sampling("ddim", steps=2, **change)))


def told(batch, dropped) -> Condition:
    mask = torch.ones(len(batch[PIXELS]), 2, dtype=torch.bool)
    return Condition(torch.ones(*mask.shape, 4), mask if dropped is None else mask & ~dropped[:, None])


def test_the_losses_of_base_and_upsampler_are_the_formulas() -> None:
    """Of a batch with the draws of its own streams, in the order of figure A.32, written out."""
    pixels = torch.randint(0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rng, noise = SampleRng(0, 0, range(6)), noise_of(COSINE)
    x0 = pixels.double() / 127.5 - 1
    network = Knowing(lambda x, t, condition: 0.5 * x)
    for objective in (PlainDenoising, Enlarging):
        size = {"shrink": 2} if objective is PlainDenoising else {"factor": 2}
        loss = objective(network, noise, Velocity(), told, drop=0.5, **size)({PIXELS: pixels}, rng)["loss"]
        x, t, condition = network.told[-1]
        clean = shrunk(x0, 2) if objective is PlainDenoising else x0
        time = rng.uniform("timestep").double()
        angle = ((time + 0.008) / 1.008 * math.pi / 2)[:, None, None, None]
        eps = rng.normal("noise", tuple(clean.shape[1:])).double()
        noised, target = angle.cos() * clean + angle.sin() * eps, angle.cos() * eps - angle.sin() * clean
        torch.testing.assert_close(x.double(), noised, rtol=1e-5, atol=1e-5)
        assert loss.item() == pytest.approx((0.5 * noised - target).square().mean().item(), rel=1e-5)
        assert torch.equal(condition.mask[:, 0], rng.uniform("condition_drop") >= 0.5)
    level, low = rng.uniform("augmentation level"), shrunk(x0, 2)
    by_hand = (level.double() * math.pi / 2)[:, None, None, None]
    seen = by_hand.cos() * low + by_hand.sin() * rng.normal("augmentation noise", (3, 4, 4)).double()
    torch.testing.assert_close(condition.picture.double(), enlarged(seen, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(condition.level, level * 999)
    heldout = Enlarging(network, noise, Velocity(), told).heldout({PIXELS: pixels}, rng, torch.linspace(0, 0.9, 6))
    assert heldout.shape == (6,) and network.told[-1][2].mask.all()


def test_latents_of_an_autoencoder_are_trained_on_as_its_decoder_expects_them() -> None:
    means = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    scaled, as_they_are = (torch.cat([given, torch.zeros_like(given)], 1) for given in (means, (means - 0.5) * 2.0))
    network, rng = Knowing(lambda x, t, condition: x), SampleRng(0, 0, range(4))

    def nothing(batch, dropped) -> Condition:
        return Condition()

    losses = [
        PlainDenoising(network, noise_of(COSINE), Velocity(), nothing, scale=scale)({MOMENTS: moments}, rng)["loss"]
        for moments, scale in ((scaled, (2.0, 0.5)), (as_they_are, (1.0, 0.0)))
    ]
    torch.testing.assert_close(*losses)


def test_a_picture_is_told_beside_the_text_and_replaces_hooks_of_the_first_network() -> None:
    text = Condition(torch.ones(2, 2, 4), hooks=AttentionHooks(edit=lambda call, map: map))
    condition = with_picture(text, images(2, 4).float(), torch.tensor([0.0, 1.0]), 2, 1000)
    assert condition.tokens is text.tokens and condition.hooks is None
    assert condition.level.tolist() == [0.0, 999.0] and condition.picture.shape == (2, 3, 8, 8)
