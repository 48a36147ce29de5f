"""Where an upsampler is asked: GLIDE's 27 timesteps, by hand; and an upsampler without augmentation."""

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
from raphael.base.records import PIXELS
from raphael.base.strict import to_dict
from raphael.diffusion.cascade import Upsampler, enlarged, shrunk
from raphael.diffusion.image_noise import ImageNoise
from raphael.diffusion.noise import noise_of
from raphael.diffusion.prediction import Velocity
from raphael.diffusion.sampling import Order
from raphael.diffusion.schedule import FAST27, fast27_timesteps, section_timesteps, spaced_sigmas
from raphael.net.condition import Condition
from raphael.objectives.plain import Enlarging, PlainDenoising

LINEAR = DiffusionConfig(1000, "linear", 1e-4, 0.02, "v", zero_terminal_snr=False)
# Fifths of 200 of the 1,000 timesteps. 10 in a fifth: every 199 / 9 = 22 1/9, from its first to its last. 3: 0, 99.5,
# 199, where 99.5 is rounded to the even 100. 2: both ends. The last, 999, is moved to 997.
BY_HAND = [
    *(0, 22, 44, 66, 88, 111, 133, 155, 177, 199),
    *(200, 222, 244, 266, 288, 311, 333, 355, 377, 399),
    *(400, 500, 599),
    *(600, 799),
    *(800, 997),
]


class Asked(nn.Module):
    """Keeps what it is asked. level_embedding: whether it is told of augmentation."""

    def __init__(self, level_embedding: bool = False):
        super().__init__()
        self.config = SimpleNamespace(level_embedding=level_embedding)
        self.seen, self.anchor = [], nn.Parameter(torch.zeros(()))

    def forward(self, x, t, condition, collect=False):
        self.seen.append((x, t, condition))
        return SimpleNamespace(prediction=torch.zeros_like(x))


def test_the_27_timesteps_are_those_by_hand() -> None:
    assert fast27_timesteps(1000) == BY_HAND and len(BY_HAND) == 27


def naive(counts: tuple[int, ...], num_steps: int) -> list[int]:
    """A section's steps one after the other, each as far from the one before."""
    found, first = [], 0
    for number, count in enumerate(counts):
        size = num_steps // len(counts) + (1 if number < num_steps % len(counts) else 0)
        place = 0.0
        for _ in range(count):
            found.append(first + round(place))
            place += (size - 1) / (count - 1) if count > 1 else 1
        first += size
    return found


@pytest.mark.parametrize("counts", [(1000,), (27,), (10, 10, 3, 2, 2), (1, 1), (2, 300, 1), (300, 1, 4)])
@pytest.mark.parametrize("num_steps", [1000, 1003])
def test_sections_are_equal_and_their_steps_equally_spaced(counts: tuple[int, ...], num_steps: int) -> None:
    found = section_timesteps(counts, num_steps)
    assert found == naive(counts, num_steps) == sorted(set(found)) and len(found) == sum(counts)
    assert found[0] == 0 and found[-1] <= num_steps - 1


def test_a_section_that_is_shorter_than_its_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="spacing: got 10 steps for 8 timesteps"):
        section_timesteps(FAST27, 40)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "continuous_cosine"])
def test_the_noise_levels_are_the_schedules_at_these_timesteps_and_end_in_zero(schedule: str) -> None:
    pure = schedule == "continuous_cosine"
    noise = noise_of(dataclasses.replace(LINEAR, schedule=schedule, zero_terminal_snr=pure))
    sigmas = spaced_sigmas(noise, "fast27", 27)
    assert sigmas.dtype == torch.float64 and len(sigmas) == 28 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    assert math.isfinite(sigmas[0]), "also where the schedule itself ends in pure noise"
    share = noise.alpha_bar_at(torch.tensor(BY_HAND[::-1]))
    torch.testing.assert_close(sigmas[:-1], ((1 - share) / share).sqrt(), rtol=1e-12, atol=1e-12)
    assert torch.equal(spaced_sigmas(noise, "trailing", 5), noise.sampling_sigmas(5))


def order(count: int, settings: Sampling) -> Order:
    return Order(Condition(), Condition(), ImageNoise([(0, index) for index in range(count)], (3, 4, 4)), settings)


def test_an_upsampler_is_asked_at_the_27_timesteps_from_noisy_to_clean() -> None:
    network, low = Asked(), torch.zeros(2, 3, 4, 4)
    how = Sampling("ddim", upsampler_steps=27, upsampler_spacing="fast27", augmentation=0.0)
    Upsampler(network, noise_of(LINEAR), Velocity(), 2)(low, order(2, how))
    assert [round(float(t[0])) for _, t, _ in network.seen] == BY_HAND[::-1]


def test_fast27_has_27_steps_and_is_told_only_where_it_is_chosen() -> None:
    with pytest.raises(ValueError, match="upsampler_steps: got 9 with upsampler_spacing fast27, expected 27"):
        Sampling(upsampler_steps=9, upsampler_spacing="fast27")
    assert Sampling(upsampler_spacing="fast27").upsampler_steps == 10, "nobody asked for another number"
    assert "upsampler_spacing" not in to_dict(Sampling())
    assert Sampling(upsampler_steps=27, upsampler_spacing="fast27").of_one_network() == Sampling()


def test_an_upsampler_that_is_told_no_level_sees_the_picture_as_it_is() -> None:
    network, low = Asked(), torch.rand(2, 3, 4, 4)
    upsampler = Upsampler(network, noise_of(LINEAR), Velocity(), 2)
    for augmentation in (0.0, Sampling.augmentation):  # nobody asked for the default
        upsampler(low, order(2, Sampling("ddim", upsampler_steps=2, augmentation=augmentation)))
        assert network.seen[-1][2].level is None and torch.equal(network.seen[-1][2].picture, enlarged(low, 2))
    with pytest.raises(ValueError, match="augmentation: got 0.5, expected 0: the upsampler was trained without"):
        upsampler(low, order(2, Sampling("ddim", upsampler_steps=2, augmentation=0.5)))


def test_it_is_trained_on_the_means_of_areas_without_noise() -> None:
    network, pixels = Asked(), torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    goal = Enlarging(network, noise_of(LINEAR), Velocity(), lambda *_: Condition(), highest=None)
    goal({PIXELS: pixels}, SampleRng(0, 0, range(4)))
    condition = network.seen[-1][2]
    assert condition.level is None
    torch.testing.assert_close(condition.picture, enlarged(shrunk(pixels.float() / 127.5 - 1, 2), 2))


def test_an_inpainting_network_is_shown_what_is_left_around_holes() -> None:
    network, pixels = Asked(), torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    network.config.inpainting = True
    goal = PlainDenoising(network, noise_of(LINEAR), Velocity(), lambda *_: Condition(), shrink=2)
    goal({PIXELS: pixels}, SampleRng(0, 0, range(64)))
    known, shown = network.seen[-1][2].picture.split((1, 3), dim=1)
    small = shrunk(pixels.float() / 127.5 - 1, 2)
    torch.testing.assert_close(shown, small * known)
    assert set(known.unique().tolist()) == {0.0, 1.0} and known.flatten(1).any(1).sum() < 64, "some see nothing"
