"""Image to image, inpainting, outpainting: what is known stays, to the bit; both ends of the strength are exact."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from truth.tiny_raphael import write_pipeline

from raphael.base.config.preset import DiffusionConfig
from raphael.base.config.sampling import Sampling
from raphael.diffusion.image_noise import noised
from raphael.diffusion.samplers import SAMPLERS, sample
from raphael.diffusion.schedule import Schedule
from raphael.edit.known import Known, filled, image_to_image, inpaint, latent_mask, outpaint, pasted
from raphael.edit.run import How, Session
from raphael.generate.pipeline import RaphaelPipeline
from raphael.net.inputs import widened
from raphael.net.moe.unet import RaphaelUNet

PROMPT = "a green star on a yellow background"
DIFFUSION = DiffusionConfig(1000, "scaled_linear", 0.00085, 0.012, "v", True)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    torch.set_num_threads(1)
    return RaphaelPipeline.from_pretrained(write_pipeline(tmp_path_factory.mktemp("model") / "raphael"))


@pytest.fixture(scope="module")
def image(pipeline):
    return np.uint8(pipeline("a red circle", num_inference_steps=2, seed=9, output_type="np").images[0] * 255)


def how(num_images=2, sampler="dpmpp_2m", steps=4):
    return How(seed=3, num_images=num_images, sampling=Sampling(steps=steps, guidance_scale=2.0, sampler=sampler))


def hole(side=32):
    mask = np.zeros((side, side), bool)
    mask[8:20, 12:24] = True
    return mask


def test_strength_0_is_the_pictures_own_decoding_and_strength_1_the_prompts_image(pipeline, image):
    session = Session(pipeline, how())
    own = session.decode(session.latents_of(image))[0]
    still = image_to_image(pipeline, image, PROMPT, 0.0, how())
    assert np.array_equal(still.result[0], own) and np.array_equal(still.result[1], own)
    free = image_to_image(pipeline, image, PROMPT, 1.0, how())
    plain = pipeline([PROMPT] * 2, sampling=how().sampling, seed=3, output_type="np").images
    assert np.array_equal(free.result, np.uint8(np.rint(plain * 255)))
    assert np.array_equal(free.result, free.without)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_from_a_noised_image_a_denoiser_that_knows_it_returns_it(sampler):
    """x_0 + sigma eps is where sampling starts, at every strength: with D = x_0 each step keeps x on that line."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, 1, 3, 3, dtype=torch.float64, generator=generator)
    seen = []

    def denoiser(x, sigma, cond):
        seen.append((float(sigma[0]), x))
        return x0

    sigmas = Schedule(DIFFUSION).sampling_sigmas(5)
    for first in (1, 3):
        seen.clear()
        start = noised(x0, eps, float(sigmas[first]))
        out = sample(Sampling(sampler=sampler), denoiser, start, sigmas[first:], None, lambda i: torch.zeros_like(x0))
        assert torch.equal(out, x0)
        sigma, x = seen[0]
        torch.testing.assert_close(x, x0 + sigma * eps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_outside_the_mask_are_the_pictures_to_the_bit(pipeline, image, sampler):
    session = Session(pipeline, how(sampler=sampler, steps=3))
    x0 = session.latents_of(image).expand(2, -1, -1, -1)
    drawn = latent_mask(hole(), (8, 8))
    out = session.draw(session.condition(PROMPT), lambda denoiser: Known(denoiser, x0, drawn))
    inside = drawn.expand_as(out)
    assert torch.equal(out[~inside], x0[~inside])
    assert (out[inside] != x0[inside]).float().mean() > 0.99


def test_pixels_outside_the_margin_are_the_pictures_and_inside_the_mask_the_drawing(pipeline, image):
    mask = hole()
    edited = inpaint(pipeline, image, mask, PROMPT, how(), feather_px=3)
    rows, columns = np.nonzero(mask)
    far = np.ones_like(mask)
    for y, x in np.ndindex(mask.shape):
        far[y, x] = min((rows - y) ** 2 + (columns - x) ** 2) >= 4**2
    assert np.array_equal(edited.result[:, far], edited.source[:, far])
    assert (edited.result[:, mask] != edited.source[:, mask]).mean() > 0.9


def test_the_feather_mixes_by_distance():
    image, drawn = np.zeros((1, 9, 3), np.uint8), np.full((1, 1, 9, 3), 200, np.uint8)
    mask = np.zeros((1, 9), bool)
    mask[0, 2] = True
    assert pasted(image, drawn, mask, 3)[0, 0, :, 0].tolist() == [100, 150, 200, 150, 100, 50, 0, 0, 0]
    assert pasted(image, drawn, mask, 0)[0, 0, :, 0].tolist() == [0, 0, 200, 0, 0, 0, 0, 0, 0]


def test_what_the_mask_hides_has_no_say_in_the_result(pipeline, image):
    """Nor through latents beside the mask, whose encoder reads some pixels of it."""
    mask, other = hole(), image.copy()
    other[mask] = 255 - other[mask]
    one, two = (inpaint(pipeline, picture, mask, PROMPT, how()) for picture in (image, other))
    assert np.array_equal(one.result, two.result)
    flat = np.full_like(image, 7)
    flat[mask] = 200
    assert np.abs(filled(flat, mask).astype(int) - 7).max() <= 2  # Telea's weights are rounded
    assert np.array_equal(filled(image, mask)[~mask], image[~mask])


def with_input(pipeline, std):
    """The pipeline's model with the input of mask and picture, its weights normal of that deviation."""
    config = replace(pipeline.unet.config, inpainting=True, picture_channels=pipeline.unet.config.latent_channels + 1)
    unet = RaphaelUNet(config)
    unet.load_state_dict(widened(unet, pipeline.unet.state_dict()))
    torch.manual_seed(1)
    torch.nn.init.normal_(unet.picture_in.weight, std=std)
    seeing = copy.copy(pipeline)
    seeing.unet = unet.eval()
    return seeing


def test_a_hole_may_begin_as_the_ground_around_it(pipeline, image):
    """Strength 0 is that ground's decoding; between, it is what sampling from the noised ground gives."""
    mask = hole()
    session = Session(pipeline, how())
    ground = session.latents_of(filled(image, mask)).expand(2, -1, -1, -1)
    still = inpaint(pipeline, image, mask, PROMPT, how(), 0, 0.0).result
    assert np.array_equal(still[:, mask], session.decode(ground)[:, mask])
    whole, plain = (inpaint(pipeline, image, mask, PROMPT, how(), 0, *more).result for more in ((1.0,), ()))
    assert np.array_equal(whole, plain)
    start = noised(ground, session.noise().start(), float(session.sigmas[2]))
    inside = latent_mask(mask, (8, 8))
    drawn = session.draw(session.condition(PROMPT), lambda one: Known(one, ground, inside), start=start, first=2)
    half = inpaint(pipeline, image, mask, PROMPT, how(), 0, 0.5)
    assert np.array_equal(half.result[:, mask], session.decode(drawn)[:, mask]) and half.facts["strength"] == 0.5
    with pytest.raises(ValueError, match="strength: got 1.5"):
        inpaint(pipeline, image, mask, PROMPT, how(), strength=1.5)


def test_a_model_that_gained_the_input_inpaints_as_before_to_the_bit_until_it_learns(pipeline, image):
    plain = inpaint(pipeline, image, hole(), PROMPT, how())
    untrained = inpaint(with_input(pipeline, 0.0), image, hole(), PROMPT, how())
    assert np.array_equal(plain.result, untrained.result) and np.array_equal(plain.without, untrained.without)
    assert untrained.facts["picture_in_input"] and not plain.facts["picture_in_input"]


def test_an_inpainting_model_sees_the_picture_and_keeps_it_to_the_bit(pipeline, image):
    seeing, other = with_input(pipeline, 0.3), np.roll(image, 5, 0)
    edited = inpaint(seeing, image, hole(), PROMPT, how(), feather_px=0)
    assert not np.array_equal(edited.result, inpaint(pipeline, image, hole(), PROMPT, how(), feather_px=0).result)
    assert np.array_equal(edited.result[:, ~hole()], edited.source[:, ~hole()])
    told = []
    seeing.unet.register_forward_pre_hook(lambda net, given: told.append(given[2].picture))
    inpaint(seeing, other, hole(), PROMPT, how())
    inside = latent_mask(hole(), (8, 8))[0, 0]
    shown = [picture for picture in told if picture is not None]
    assert shown and all(len(picture) == 4 for picture in shown), "two rows, and their unconditional ones"
    assert all(not picture[:, :, inside].any() and (picture[:, 0, ~inside] == 1).all() for picture in shown)
    assert all(torch.equal(picture[:2], picture[2:]) for picture in shown)
    plain = seeing(PROMPT, sampling=how().sampling, seed=3, output_type="np").images
    assert np.array_equal(np.uint8(np.rint(plain * 255)), inpaint(seeing, other, hole(), PROMPT, how(1)).without)


def test_a_latent_is_drawn_where_any_of_its_pixels_is():
    mask = hole()
    blocks = mask.reshape(8, 4, 8, 4).any((1, 3))
    assert np.array_equal(latent_mask(mask, (8, 8))[0, 0].numpy(), blocks)


def test_outpainting_keeps_the_picture_and_draws_the_margins(pipeline, image):
    edited = outpaint(pipeline, image, PROMPT, (0, 4, 8, 4), how())
    assert edited.result.shape == (2, 40, 40, 3)
    inner = edited.result[:, : 32 - 5, 9 : 36 - 5]
    assert np.array_equal(inner, np.repeat(image[None, :27, 5:27], 2, 0))
    assert (edited.result[:, 32:] != edited.source[:, 32:]).mean() > 0.9


def test_bad_pictures_masks_and_numbers_are_refused(pipeline, image):
    nothing, everything = np.zeros((32, 32), bool), np.ones((32, 32), bool)
    with pytest.raises(ValueError, match="strength: got -0.1, expected a share from 0 to 1"):
        image_to_image(pipeline, image, PROMPT, -0.1)
    with pytest.raises(ValueError, match=r"image: got uint8 \(31, 32, 3\), expected uint8 \(32, 32, 3\)"):
        image_to_image(pipeline, image[1:], PROMPT)
    with pytest.raises(ValueError, match=r"mask: got bool \(16, 16\), expected bool \(32, 32\)"):
        inpaint(pipeline, image, nothing[::2, ::2], PROMPT)
    with pytest.raises(ValueError, match="mask: got an empty one"):
        inpaint(pipeline, image, nothing, PROMPT)
    with pytest.raises(ValueError, match="mask: got all of the image"):
        inpaint(pipeline, image, everything, PROMPT)
    with pytest.raises(ValueError, match="margins: got"):
        outpaint(pipeline, image, PROMPT, (0, 0, 0, -8))
    with pytest.raises(ValueError, match="expected multiples of 8"):
        outpaint(pipeline, image, PROMPT, (0, 3, 0, 0))
