"""Variations, interpolation, inversion: ends are hit, the way between keeps to the sphere, DDIM is undone."""

import math

import numpy as np
import pytest
import torch
from truth.closed_form_diffusion import COND, gaussian_denoiser, no_noise
from truth.tiny_raphael import write_pipeline

from raphael.base.config.preset import DiffusionConfig
from raphael.base.config.sampling import Sampling
from raphael.diffusion.samplers import sample
from raphael.diffusion.schedule import Schedule
from raphael.edit.invert import ROUNDS, inverted, reconstruct
from raphael.edit.rewrite import Keep, replace
from raphael.edit.run import How, Session
from raphael.edit.vary import between, interpolate, slerp, variations
from raphael.generate.pipeline import RaphaelPipeline
from raphael.net.condition import Condition

FIRST, SECOND = "a red circle on blue", "a green star on a yellow background"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    torch.set_num_threads(1)
    return RaphaelPipeline.from_pretrained(write_pipeline(tmp_path_factory.mktemp("model") / "raphael"))


def how(num_images=3, seed=3, **changes):
    return How(seed=seed, num_images=num_images, sampling=Sampling(steps=3, guidance_scale=2.0, **changes))


def test_slerp_is_the_rotation_in_the_plane_of_its_ends():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, 5, dtype=torch.float64, generator=generator)
    turned = torch.randn(4, 3, 5, dtype=torch.float64, generator=generator)
    # Gram and Schmidt: a unit vector across, and an end at a known angle
    a = start / start.norm(dim=(1, 2), keepdim=True)
    b = turned - (turned * a).sum((1, 2), keepdim=True) * a
    b = b / b.norm(dim=(1, 2), keepdim=True)
    for angle in (0.3, 1.2, 3.0):
        end = math.cos(angle) * a + math.sin(angle) * b
        for share in (0.0, 0.25, 0.6, 1.0):
            expected = math.cos(share * angle) * a + math.sin(share * angle) * b
            torch.testing.assert_close(slerp(a, end, share, (1, 2)), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(slerp(a, a, 0.3, (1, 2)), 0.7 * a + 0.3 * a)


def test_interpolation_hits_both_ends_and_leaves_them_in_between(pipeline):
    edited = interpolate(pipeline, FIRST, SECOND, 8, how(4))
    for image, prompt, seed in ((edited.result[0], FIRST, 3), (edited.result[-1], SECOND, 8)):
        plain = pipeline(prompt, sampling=how().sampling, seed=seed, output_type="np").images[0]
        assert np.abs(plain * 255 - image).max() <= 1.01
    assert np.array_equal(edited.without[0], edited.result[0])
    assert np.array_equal(edited.without[-1], edited.result[-1])
    assert not np.array_equal(edited.result[1], edited.without[1])


def test_between_two_conditions_a_token_that_one_has_is_that_ones():
    tokens = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one = Condition(tokens[:1], torch.tensor([[True, True, False]]))
    other = Condition(tokens[1:], torch.tensor([[True, False, True]]))
    middle = between(one, other, 0.5)
    assert middle.mask.tolist() == [[True, True, True]]
    assert torch.equal(middle.tokens[0, 1], one.tokens[0, 1]) and torch.equal(middle.tokens[0, 2], other.tokens[0, 2])
    torch.testing.assert_close(middle.tokens[0, 0], slerp(one.tokens, other.tokens, 0.5, (2,))[0, 0])
    assert between(one, other, 0.0) is one and between(one, other, 1.0) is other


def test_a_variation_of_strength_0_is_the_image_and_of_1_another_seeds(pipeline):
    still, free = (variations(pipeline, FIRST, strength, how()) for strength in (0.0, 1.0))
    assert np.array_equal(still.result, still.source) and np.array_equal(free.result, free.without)
    plain = pipeline([FIRST] * 4, sampling=how().sampling, seed=3, output_type="np").images * 255
    assert np.abs(plain[0] - still.source).max() <= 1.01 and np.abs(plain[1:] - free.result).max() <= 1.01
    some = variations(pipeline, FIRST, 0.3, how())
    assert len({image.tobytes() for image in some.result}) == 3


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize(("steps", "rounds"), [(10, 12), (200, 12), (200, ROUNDS)])
def test_inversion_then_ddim_returns_the_latents_on_an_analytic_denoiser(steps, rounds, zero_terminal_snr):
    schedule = Schedule(DiffusionConfig(1000, "scaled_linear", 0.00085, 0.012, "v", zero_terminal_snr))
    sigmas = schedule.sampling_sigmas(steps)
    x0 = 1.5 + 0.4 * torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start = inverted(gaussian_denoiser, x0, sigmas, COND, rounds=rounds)
    back = sample(Sampling(sampler="ddim"), gaussian_denoiser, start, sigmas, COND, no_noise)
    assert (back - x0).abs().max() < 1e-3
    assert (start - torch.randn_like(start)).abs().max() > 0.1


def test_the_start_that_is_found_is_the_noise_that_the_latents_were_drawn_from():
    """With finite sigmas DDIM is a one-to-one map; the exact one of Gaussian data is affine."""
    schedule = Schedule(DiffusionConfig(1000, "scaled_linear", 0.00085, 0.012, "v", False))
    sigmas = schedule.sampling_sigmas(20)
    noise = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x0 = sample(Sampling(sampler="ddim"), gaussian_denoiser, noise, sigmas, COND, no_noise)
    found = inverted(gaussian_denoiser, x0, sigmas, COND, rounds=60)
    torch.testing.assert_close(found, noise, rtol=0, atol=1e-6)


def test_guided_from_its_own_prompt_a_source_is_guided_nowhere(pipeline):
    """The cure: D(c) + s (D(c) - D(c)) is D(c) at every scale."""
    image = np.uint8(pipeline(FIRST, num_inference_steps=2, seed=9, output_type="np").images[0] * 255)
    strong, plain = (
        reconstruct(pipeline, image, FIRST, How(sampling=Sampling(steps=4, guidance_scale=scale)))
        for scale in (6.0, 1.0)
    )
    assert np.abs(strong.result.astype(int) - plain.result).max() <= 1
    assert not np.array_equal(strong.without, plain.without)


def test_a_real_picture_is_edited_from_its_own_noise(pipeline):
    image = np.uint8(pipeline(FIRST, num_inference_steps=2, seed=9, output_type="np").images[0] * 255)
    one = How(num_images=1, sampling=Sampling(steps=4, guidance_scale=2.0))
    edited = replace(pipeline, FIRST, "a red star on blue", one, Keep(), image)
    again = reconstruct(pipeline, image, FIRST, one)
    assert edited.facts["sampler"] == "ddim" and np.array_equal(edited.shown["the picture"][0], image)
    assert np.abs(edited.source.astype(int) - again.result).max() <= 1
    same = replace(pipeline, FIRST, FIRST, one, Keep(1.0, 1.0), image)
    assert np.array_equal(same.result, same.source)


def test_bad_ends_and_strengths_are_refused(pipeline):
    with pytest.raises(ValueError, match="strength: got 1.1"):
        variations(pipeline, FIRST, 1.1)
    with pytest.raises(ValueError, match="got one prompt and one seed"):
        interpolate(pipeline, FIRST)
    with pytest.raises(ValueError, match="num_images: got 1, expected at least 2"):
        interpolate(pipeline, FIRST, SECOND)
    assert Session(pipeline, How()).size_px == (32, 32)
