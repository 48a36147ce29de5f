from dataclasses import fields, replace
from typing import get_args

import numpy as np
import pytest
import torch
from truth.sampling_options import with_another
from truth.tiny_raphael import write_pipeline

from raphael.base.config.params import GenerateConfig, load_config
from raphael.base.config.preset import DiffusionConfig
from raphael.base.config.sampling import SamplerName
from raphael.base.images.grid import image_grid
from raphael.base.stage import StageError
from raphael.diffusion.sampling import Parts, Sampling, generate_images, generate_latents, sampling_of
from raphael.diffusion.schedule import Schedule
from raphael.generate.pipeline import RaphaelPipeline

ROUNDING = 2e-3  # of latents of order 1: kernels differ between batch sizes in the last bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return write_pipeline(tmp_path_factory.mktemp("model") / "raphael")


@pytest.fixture(scope="module")
def pipeline(folder):
    return RaphaelPipeline.from_pretrained(folder)


def test_a_prompt_becomes_images_of_the_trained_size(pipeline):
    images = pipeline("a red circle", num_inference_steps=2, num_images_per_prompt=2).images
    assert [image.size for image in images] == [(32, 32)] * 2
    assert np.any(np.asarray(images[0]) != np.asarray(images[1]))


def test_the_same_seed_draws_the_same_bytes_and_another_seed_does_not(pipeline):
    first, again, other = (pipeline("a star", num_inference_steps=2, seed=seed).images[0] for seed in (5, 5, 6))
    assert first.tobytes() == again.tobytes() != other.tobytes()


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_an_image_is_the_same_whatever_stands_beside_it_in_the_batch(pipeline, sampler):
    parts, settings = pipeline.parts(), Sampling(sampler, 3, 3.0)
    prompts, seeds = [f"prompt {i}" for i in range(7)], [(3, i) for i in range(7)]
    together = generate_latents(parts, prompts, seeds, settings)
    alone = torch.cat([generate_latents(parts, prompts[i : i + 2], seeds[i : i + 2], settings) for i in range(0, 7, 2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=ROUNDING)


def test_batches_of_one_size_give_the_very_same_bytes_in_any_order(pipeline):
    parts, settings = pipeline.parts(), Sampling("ddpm", 3, 3.0)
    prompts, seeds = [f"prompt {i}" for i in range(8)], [(3, i) for i in range(8)]
    forward = generate_images(parts, prompts, seeds, settings, batch_size=4)
    second_half = generate_images(parts, prompts[4:], seeds[4:], settings, batch_size=4)
    assert np.array_equal(forward[4:], second_half)


def test_guidance_of_one_batch_equals_two_forwards_put_together_by_hand(pipeline):
    """One step of DDIM from sigma to 0 is the guided estimate of x_0 itself: D(null) + s (D(c) - D(null))."""
    parts = pipeline.parts()
    x = {scale: generate_latents(parts, ["a ring"], [(0, 0)], Sampling("ddim", 1, scale)) for scale in (0.0, 1.0, 5.0)}
    torch.testing.assert_close(x[5.0], x[0.0] + 5 * (x[1.0] - x[0.0]), rtol=1e-4, atol=1e-3)


def test_guidance_acts_inside_its_interval_alone(pipeline):
    """Two steps of DDIM, at timesteps 999 and 499: guided in the first only, in the second only, in both, in none."""
    parts = pipeline.parts()

    def draw(scale, *interval):
        return generate_latents(parts, ["a ring"], [(0, 0)], Sampling("ddim", 2, scale, guidance_interval=interval))

    everywhere, nowhere = draw(5.0, 0.0, 1.0), draw(1.0, 0.0, 1.0)
    early, late = draw(5.0, 0.6, 1.0), draw(5.0, 0.0, 0.6)
    assert torch.equal(draw(5.0, 0.6, 0.7), nowhere)
    assert len({tensor.numpy().tobytes() for tensor in (everywhere, nowhere, early, late)}) == 4
    with pytest.raises(ValueError, match="guidance_interval: got 0.7 to 0.2"):
        draw(5.0, 0.7, 0.2)


def test_a_threshold_keeps_the_drawn_values_within_its_bound(pipeline):
    parts, free = pipeline.parts(), Sampling("ddim", 3, 9.0)
    wild = generate_latents(parts, ["a ring"], [(0, 0)], free)
    for kind in ("static", "dynamic"):
        bounded = generate_latents(parts, ["a ring"], [(0, 0)], replace(free, threshold=kind, threshold_bound=0.5))
        assert bounded.abs().max() <= 0.5 * (1 + 1e-6) < wild.abs().max()


def test_a_model_trained_to_zero_terminal_snr_draws_from_pure_noise(pipeline):
    parts = replace(pipeline.parts(), schedule=Schedule(replace(pipeline.diffusion, zero_terminal_snr=True)))
    for sampler in get_args(SamplerName):
        latents = generate_latents(parts, ["a ring"], [(0, 0)], Sampling(sampler, 3, 3.0))
        assert torch.isfinite(latents).all()


def test_eta_reaches_the_sampler_under_diffusers_name(pipeline):
    pipeline.sampler = "ddim"
    try:
        calm, wild = (pipeline("a", num_inference_steps=3, eta=eta, output_type="np").images for eta in (0.0, 1.0))
    finally:
        pipeline.sampler = "dpmpp_2m"
    assert not np.array_equal(calm, wild)
    with pytest.raises(ValueError, match="eta: got 1 with sampler dpmpp_2m"):
        pipeline("a", num_inference_steps=1, eta=1.0)


def test_every_setting_of_sampling_comes_from_the_settings_file():
    config = load_config(write_pipeline.__globals__["ROOT"] / "params.yaml").generate
    for field in fields(Sampling):
        changed = replace(config, **with_another(field))
        drawn = sampling_of(changed)
        assert type(drawn) is Sampling and getattr(drawn, field.name) != getattr(Sampling(), field.name)
        assert all(getattr(drawn, other.name) == getattr(changed, other.name) for other in fields(Sampling))


def test_settings_of_sampling_that_contradict_each_other_are_refused():
    config = load_config(write_pipeline.__globals__["ROOT"] / "params.yaml").generate
    assert isinstance(config, GenerateConfig)
    with pytest.raises(ValueError, match="eta: got 0.5 with sampler heun"):
        replace(config, sampler="heun", eta=0.5)
    with pytest.raises(ValueError, match="guidance_interval: got .*expected two shares"):
        replace(config, guidance_interval=(0.9, 0.1))
    with pytest.raises(ValueError, match="zero_terminal_snr: got true with prediction eps"):
        DiffusionConfig(1000, "linear", 1e-4, 0.02, "eps", True)


def test_without_guidance_a_negative_prompt_changes_nothing_and_with_it_it_does(pipeline):
    def draw(scale, negative):
        return pipeline("a", negative, num_inference_steps=1, guidance_scale=scale, output_type="np").images

    assert np.array_equal(draw(1.0, None), draw(1.0, "blue"))
    assert not np.array_equal(draw(4.0, None), draw(4.0, "blue"))


def test_another_size_can_be_asked_for_and_one_that_does_not_fit_is_an_error(pipeline):
    assert pipeline("a", num_inference_steps=1, height=48, width=64).images[0].size == (64, 48)
    assert pipeline("a", num_inference_steps=1, height=24, width=40).images[0].size == (40, 24)
    assert pipeline("a", num_inference_steps=1).images[0].size == (32, 32)  # the first that was trained at
    with pytest.raises(ValueError, match="multiples of 8"):
        pipeline("a", height=30)
    with pytest.raises(ValueError, match="output_type"):
        pipeline("a", output_type="jpeg")
    with pytest.raises(ValueError, match="steps"):
        pipeline("a", num_inference_steps=0)


def test_an_empty_prompt_is_the_unconditional_image_and_no_prompt_is_an_error(pipeline):
    """D(null) + s (D(c) - D(null)) with c = null is D(null), whatever the scale."""
    guided, free = (pipeline("", num_inference_steps=2, guidance_scale=s, output_type="np").images for s in (7.0, 0.0))
    np.testing.assert_allclose(guided, free, atol=2 / 255)
    assert not np.array_equal(guided, pipeline("a ring", num_inference_steps=2, output_type="np").images)
    with pytest.raises(ValueError, match="prompt: got nothing to generate, expected a text or a list of texts"):
        pipeline([])


def test_a_prompt_longer_than_the_context_is_cut_and_its_closing_token_kept(pipeline):
    length = pipeline.text_encoder.context_length
    fits = "red " * (length - 2)  # with the opening and the closing token
    ids = pipeline.text_encoder.tokenize([fits, fits + "and a thousand other words " * 50])
    assert torch.equal(ids[0], ids[1]) and pipeline.text_encoder.tokens_of(fits)[-1] == "<end>"
    one, other = (
        pipeline(text, num_inference_steps=1, output_type="np").images for text in (fits, fits + "blue " * 99)
    )
    assert np.array_equal(one, other)
    with pytest.raises(ValueError, match=rf"token ids: got \(1, {length + 1}\), expected \(B, {length}\)"):
        pipeline.text_encoder.encode(torch.zeros(1, length + 1, dtype=torch.long))


def test_a_nan_in_one_image_s_noise_stays_in_that_image(pipeline, monkeypatch):
    from raphael.diffusion.sampling import ImageNoise

    start = ImageNoise.start

    def broken(self):
        noise = start(self)
        noise[0, 0, 0, 0] = float("nan")
        return noise

    parts, settings = pipeline.parts(), Sampling("ddim", 2, 3.0)
    whole = generate_latents(parts, ["a ring", "a star"], [(0, 0), (0, 1)], settings)
    monkeypatch.setattr(ImageNoise, "start", broken)
    latents = generate_latents(parts, ["a ring", "a star"], [(0, 0), (0, 1)], settings)
    assert latents[0].isnan().all() and torch.equal(latents[1], whole[1])


def test_what_is_inside_has_one_map_per_word_and_one_route_per_block(pipeline):
    result = pipeline(["a red circle", "CAT"], num_inference_steps=1, collect=True)
    inside = result.insight
    blocks, tokens = pipeline.unet.num_blocks, pipeline.text_encoder.context_length
    assert inside.attention.shape == (2, tokens, 8, 8)
    assert inside.edges.shape == (2, 8, 8)
    assert inside.routes.shape == (2, blocks, tokens)
    real = [i for i, word in enumerate(inside.words[0]) if word]
    assert [inside.words[0][i] for i in real] == ["<start>", "a", "red", "circle", "<end>"]
    assert np.allclose(inside.attention[0, real].max((1, 2)), 1)
    assert 0 <= inside.edges.min() and inside.edges.max() <= 1


def test_sampling_leaves_a_network_in_training_as_it_was(pipeline):
    parts: Parts = pipeline.parts()
    pipeline.unet.train()
    generate_latents(parts, ["a"], [(0, 0)], Sampling("ddim", 1, 1.0))
    assert pipeline.unet.training
    pipeline.unet.eval()


def test_a_checkpoint_that_is_absent_or_of_another_shape_says_so_in_one_line(folder, tmp_path):
    with pytest.raises(StageError, match="no such folder"):
        RaphaelPipeline.from_pretrained(tmp_path / "nothing")
    other = write_pipeline(tmp_path / "raphael")
    from raphael.base.checkpoint.folder import read_checkpoint, write_checkpoint

    groups, meta = read_checkpoint(other)
    meta["unet"]["channels"] = [32, 32]
    write_checkpoint(other, groups, meta)
    with pytest.raises(StageError) as error:
        RaphaelPipeline.from_pretrained(other)
    assert "expected" in str(error.value) and "\n" not in str(error.value)


def test_a_grid_holds_every_image_where_it_belongs():
    pictures = [np.full((8, 8, 3), value, np.uint8) for value in (10, 20, 30)]
    grid = np.asarray(image_grid(pictures, columns=2, margin_px=2))
    assert grid.shape == (22, 22, 3)
    assert (grid[2:10, 2:10] == 10).all() and (grid[2:10, 12:20] == 20).all() and (grid[12:20, 2:10] == 30).all()
    assert (grid[12:20, 12:20] == 255).all()
    with pytest.raises(ValueError, match="no images"):
        image_grid([], 2)


@pytest.mark.parametrize("caption", ["m" * 60, "W W W W W W W W W W W W W W W W W", "a plain wide word, drawn " * 9])
def test_a_caption_stays_below_its_own_image(caption):
    pictures = [np.zeros((8, 8, 3), np.uint8)] * 2
    empty, told = (np.asarray(image_grid(pictures, columns=2, captions=texts)) for texts in (["", ""], [caption, ""]))
    changed = np.argwhere((empty != told).any(-1))
    assert changed[:, 1].max() < 4 + 160 <= changed[:, 0].min()


def test_an_autocast_of_the_caller_is_left_alone_unless_the_pipeline_has_a_precision(pipeline):
    def drawn(precision=None):
        pipeline.precision = precision
        return pipeline("a red circle", num_inference_steps=2, output_type="np").images

    plain = drawn()
    assert np.array_equal(plain, drawn("fp32")) and not np.array_equal(plain, drawn("bf16"))
    with torch.autocast("cpu", torch.bfloat16):
        cast, kept = drawn(), drawn("fp32")
    assert not np.array_equal(cast, plain), "the caller's autocast had no effect"
    # what is drawn is in fp32 as asked for; the autoencoder decodes as the caller's autocast says
    assert np.abs(kept - plain).max() < np.abs(cast - plain).max() + 0.02
    pipeline.precision = None
