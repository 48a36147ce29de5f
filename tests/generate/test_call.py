"""The arguments of a pipeline's call: what each does, and what it refuses."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
import torch
from truth.tiny_raphael import write_pipeline

from raphael.generate.pipeline import RaphaelPipeline

SHAPE = (4, 8, 8)  # latents of write_pipeline's model at 32 x 32 px
FREE = {"num_inference_steps": None, "guidance_scale": None}  # as `sampling` says


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    torch.set_num_threads(1)
    loaded = RaphaelPipeline.from_pretrained(write_pipeline(tmp_path_factory.mktemp("model") / "raphael"))
    assert loaded.parts().latent_shape == SHAPE
    return loaded


def drawn(pipeline, *prompt, **named):
    named = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np", **named}
    return pipeline(*prompt, **named).images


def test_a_list_of_negative_prompts_is_one_for_each_prompt(pipeline):
    prompts, negatives = ["a ring", "a star"], ["blue", "red"]
    both = drawn(pipeline, prompts, negative_prompt=negatives, num_images_per_prompt=2, latents=torch.ones(4, *SHAPE))
    for row in range(4):
        alone = drawn(pipeline, prompts[row // 2], negative_prompt=negatives[row // 2], latents=torch.ones(1, *SHAPE))
        np.testing.assert_allclose(both[row], alone[0], atol=1.01 / 255)
    assert not np.array_equal(both[0], both[2])
    assert np.array_equal(drawn(pipeline, prompts, negative_prompt="blue"), drawn(pipeline, prompts, ["blue", "blue"]))
    with pytest.raises(ValueError, match="negative_prompt: got 3 for 2 prompts, expected one, or one for each"):
        drawn(pipeline, prompts, negative_prompt=["a", "b", "c"])


def test_a_generator_goes_on_where_it_was_and_a_fresh_one_repeats(pipeline):
    generator = torch.Generator().manual_seed(7)
    first, second = (drawn(pipeline, "a ring", generator=generator) for _ in range(2))
    again = drawn(pipeline, "a ring", generator=torch.Generator().manual_seed(7))
    assert np.array_equal(first, again) and not np.array_equal(first, second)


def test_a_generator_gives_the_noise_that_diffusers_draws_from_it(pipeline):
    from diffusers.utils.torch_utils import randn_tensor

    for make in (lambda: torch.Generator().manual_seed(5), lambda: [torch.Generator().manual_seed(i) for i in (5, 6)]):
        latents = randn_tensor((2, *SHAPE), generator=make())
        prompts = ["a ring", "a star"]
        assert np.array_equal(
            drawn(pipeline, prompts, generator=make()), drawn(pipeline, prompts, latents=latents, seed=99)
        )
    with pytest.raises(ValueError, match="generator: got 2, expected one, or one for each of 3 images"):
        drawn(pipeline, ["a"] * 3, generator=make())


def test_a_list_of_generators_makes_each_image_its_own_also_with_noise_in_every_step(pipeline):
    pipeline.sampler = "ddpm"
    try:
        make = lambda *seeds: [torch.Generator().manual_seed(seed) for seed in seeds]  # noqa: E731
        both = drawn(pipeline, ["a ring"] * 2, generator=make(3, 4), num_inference_steps=4)
        alone = drawn(pipeline, "a ring", generator=make(4), num_inference_steps=4)
    finally:
        pipeline.sampler = "dpmpp_2m"
    np.testing.assert_allclose(both[1], alone[0], atol=1.01 / 255)


def test_a_list_of_seeds_makes_each_image_the_first_of_its_own(pipeline):
    both = drawn(pipeline, ["a ring", "a star"], seed=[3, 4])
    for row, (prompt, seed) in enumerate((("a ring", 3), ("a star", 4))):
        np.testing.assert_allclose(both[row], drawn(pipeline, prompt, seed=seed)[0], atol=1.01 / 255)
    numbered = drawn(pipeline, ["a ring"] * 3, seed=[(3, 0), (3, 1), (3, 2)])
    assert np.array_equal(numbered, drawn(pipeline, ["a ring"] * 3, seed=3))
    with pytest.raises(ValueError, match="seed: got 2, expected one, or one for each of 3 images"):
        drawn(pipeline, ["a"] * 3, seed=[1, 2])
    for wrong in ("7", 1.5, [1, 2.5], [True]):
        with pytest.raises(ValueError, match=r"seed: got .*, expected a whole number, or one for each image"):
            drawn(pipeline, ["a"], seed=wrong)


def test_latents_are_where_sampling_begins(pipeline):
    from raphael.diffusion.sampling import ImageNoise

    start = ImageNoise([(11, 0), (11, 1)], SHAPE).start()
    prompts = ["a ring", "a star"]
    assert np.array_equal(drawn(pipeline, prompts, latents=start), drawn(pipeline, prompts, seed=11))
    with pytest.raises(ValueError, match=r"latents: got shape \(2, 4, 8, 8\), expected \(1, 4, 8, 8\)"):
        drawn(pipeline, "a ring", latents=start)


def test_embeddings_stand_in_for_the_prompts_that_they_encode(pipeline):
    cond, null = pipeline.encode(["a ring", "a star"]), pipeline.encode(["blue"])
    named = {"prompt_embeds": cond.tokens, "prompt_attention_mask": cond.mask.long()}
    embeds = drawn(pipeline, **named, negative_prompt_embeds=null.tokens, negative_prompt_attention_mask=null.mask)
    words = drawn(pipeline, ["a ring", "a star"], negative_prompt="blue")
    np.testing.assert_allclose(embeds, words, atol=1.01 / 255)
    np.testing.assert_allclose(drawn(pipeline, prompt_embeds=cond, negative_prompt_embeds=null), words, atol=1.01 / 255)
    with pytest.raises(ValueError, match="prompt: got both prompt and prompt_embeds"):
        drawn(pipeline, "a ring", **named)
    with pytest.raises(ValueError, match=r"prompt_embeds: got shape \(2, 3, 5\), expected \('n', "):
        drawn(pipeline, prompt_embeds=torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="prompt_embeds: got a mask alone"):
        drawn(pipeline, prompt_attention_mask=cond.mask)
    with pytest.raises(ValueError, match="negative_prompt: got it with negative_prompt_embeds"):
        drawn(pipeline, **named, negative_prompt="a", negative_prompt_embeds=null)
    with pytest.raises(ValueError, match="prompt: got nothing to generate"):
        drawn(pipeline)
    with pytest.raises(ValueError, match="prompt: got 5, expected a text"):
        drawn(pipeline, 5)


def test_timesteps_and_sigmas_that_are_the_schedules_own_change_nothing(pipeline):
    own = pipeline.schedule.sampling_sigmas(4)
    timesteps = pipeline.schedule.timestep(own[:-1]).round().int().tolist()
    plain = drawn(pipeline, "a ring", num_inference_steps=4)
    assert np.array_equal(plain, drawn(pipeline, "a ring", timesteps=timesteps))
    assert np.array_equal(plain, drawn(pipeline, "a ring", sigmas=own[:-1].tolist()))
    assert np.array_equal(plain, drawn(pipeline, "a ring", sigmas=own))
    assert not np.array_equal(plain, drawn(pipeline, "a ring", timesteps=[timesteps[0], 300, 200, 100]))
    for wrong, message in (
        ({"timesteps": [5, 9]}, r"timesteps: got \[5, 9\], expected at least one, each less than the one before"),
        ({"timesteps": []}, r"timesteps: got \[\], expected at least one"),
        ({"timesteps": [1000, 9]}, "timesteps: got .* expected numbers from 0 to 999"),
        ({"sigmas": [1e9, 1]}, "sigmas: got .* expected numbers from 0 to "),
        ({"sigmas": [2, 1], "timesteps": [1]}, "timesteps: got them with sigmas"),
    ):
        with pytest.raises(ValueError, match=message):
            drawn(pipeline, "a ring", **wrong)


def test_rescaled_guidance_is_a_setting_of_the_call(pipeline):
    from dataclasses import replace

    asked = replace(pipeline.defaults, guidance_rescale=0.7, steps=2, guidance_scale=3.0)
    by_name, plain = drawn(pipeline, "a ring", guidance_rescale=0.7), drawn(pipeline, "a ring")
    assert np.array_equal(by_name, pipeline("a ring", sampling=asked, output_type="np").images)
    assert not np.array_equal(by_name, plain)


def test_every_output_type_is_of_the_same_images(pipeline):
    named = {"num_inference_steps": 2, "num_images_per_prompt": 2}
    numbers = pipeline("a ring", output_type="np", **named).images
    assert numbers.shape == (2, 32, 32, 3) and numbers.dtype == np.float32 and 0 <= numbers.min() <= numbers.max() <= 1
    tensor = pipeline("a ring", output_type="pt", **named).images
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), numbers)
    images = pipeline("a ring", **named).images
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), np.round(numbers * 255).astype(np.uint8))
    latents = pipeline("a ring", output_type="latent", **named).images
    from raphael.diffusion.sampling import decode_images

    assert np.array_equal(decode_images(pipeline.parts(), latents), np.round(numbers * 255).astype(np.uint8))
    (listed,) = pipeline("a ring", output_type="np", return_dict=False, **named)
    assert np.array_equal(listed, numbers)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "heun", "dpmpp_2m", "unipc", "euler_ancestral"])
def test_a_callback_sees_the_latents_after_every_step_and_may_change_them(pipeline, sampler):
    from dataclasses import replace

    settings, seen = replace(pipeline.defaults, sampler=sampler, steps=3, guidance_scale=1.0), []

    def look(pipe, step, timestep, tensors):
        assert pipe is pipeline and set(tensors) == {"latents", "x0"}
        seen.append((step, timestep, tensors["latents"].clone(), tensors["x0"].clone()))

    names = ["latents", "x0"]
    plain = pipeline("a ring", sampling=settings, output_type="latent").images
    watched = pipeline(
        "a ring", sampling=settings, output_type="latent",
        callback_on_step_end=look, callback_on_step_end_tensor_inputs=names,
    ).images  # fmt: skip
    assert torch.equal(plain, watched) and torch.equal(seen[-1][2], plain)
    assert [step for step, *_ in seen] == [0, 1, 2]
    own = pipeline.schedule.timestep(pipeline.schedule.sampling_sigmas(3)[:-1])
    assert [timestep for _, timestep, *_ in seen] == own.tolist()
    torch.testing.assert_close(seen[-1][3], plain, rtol=0, atol=1e-4)  # the last step ends at its estimate

    def zero_at_the_end(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * (0 if step == 2 else 1)}

    changed = pipeline("a ring", sampling=settings, output_type="latent", callback_on_step_end=zero_at_the_end).images
    assert not changed.any()


def test_latents_that_a_callback_changes_are_what_sampling_goes_on_from(pipeline):
    """Euler has no memory: from the changed state on it is a run of the levels that are left."""
    from dataclasses import replace

    settings = replace(pipeline.defaults, sampler="euler", steps=4, guidance_scale=1.0)
    own, other = pipeline.schedule.sampling_sigmas(4), torch.linspace(-1, 1, 256).view(1, *SHAPE)
    changed = pipeline(
        "a ring", sampling=settings, output_type="latent",
        callback_on_step_end=lambda pipe, step, t, tensors: {"latents": other} if step == 1 else {},
    ).images  # fmt: skip
    start = other / (1 + own[2] ** 2).sqrt().float()
    rest = pipeline("a ring", sampling=settings, output_type="latent", latents=start, sigmas=own[2:]).images
    torch.testing.assert_close(changed, rest, rtol=1e-4, atol=1e-4)


def test_an_interrupted_call_returns_what_stands_there_and_the_next_one_is_whole(pipeline):
    seen = []

    def stop(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = step == 1

    named = {"num_inference_steps": 5, "output_type": "latent"}
    stopped = pipeline("a ring", callback_on_step_end=stop, **named).images
    assert len(seen) == 2 and torch.equal(stopped, seen[-1])
    assert not torch.equal(pipeline("a ring", **named).images, stopped)
    with pytest.raises(ValueError, match="tensor_inputs: got 'noise', expected some of latents, x0"):
        pipeline("a", callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["noise"])
    with pytest.raises(ValueError, match=r"callback_on_step_end: got latents of shape \(1,\), expected \(1, 4, 8, 8\)"):
        pipeline("a", callback_on_step_end=lambda *_: {"latents": torch.zeros(1)}, **named)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("num_inference_step", "did you mean num_inference_steps?"),
        ("guidance_scal", "did you mean guidance_scale?"),
        ("cross_attention_kwargs", "docs/guides/generate.md lists what there is"),
        ("n_images_per_prompt", "did you mean num_images_per_prompt?"),
        ("steps", "did you mean num_inference_steps?"),
        ("denoising_strength", "did you mean strength?"),
        ("sampler", "it is an option of sampling: sampling=Sampling(sampler=...)"),
    ],
)
def test_an_unknown_argument_is_a_type_error_that_names_the_nearest(pipeline, wrong, near):
    with pytest.raises(TypeError) as error:
        pipeline("a ring", **{wrong: 3})
    assert str(error.value) == f"{wrong}: no such argument; {near}"


def picture(side=32):
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm"])
def test_image_to_image_is_the_edit_of_that_name_to_the_bit(pipeline, sampler):
    from raphael.base.config.sampling import Sampling
    from raphael.edit.known import image_to_image
    from raphael.edit.run import How

    sampling = Sampling(sampler=sampler, steps=5, guidance_scale=3.0)
    for strength in (0.0, 0.4, 1.0):
        edited = image_to_image(pipeline, picture(), "a ring", strength, How(7, 2, sampling))
        given = {"image": PIL.Image.fromarray(picture()), "strength": strength}
        called = drawn(pipeline, "a ring", num_images_per_prompt=2, sampling=sampling, seed=7, **given, **FREE)
        assert np.array_equal(np.uint8(np.rint(called * 255)), edited.result), strength


def test_an_image_for_each_prompt_and_one_for_all_and_the_images_own_size(pipeline):
    wide = np.concatenate([picture(), picture()[:, :8]], axis=1)
    both = drawn(pipeline, ["a ring", "a star"], image=[wide, wide[::-1].copy()], strength=0.5, num_images_per_prompt=2)
    assert both.shape == (4, 32, 40, 3)
    turned = drawn(pipeline, ["a ring", "a star"], image=wide, strength=0.5, num_images_per_prompt=2)
    assert np.array_equal(both[:2], turned[:2]) and not np.array_equal(both[2:], turned[2:])


def test_images_that_do_not_fit_are_refused(pipeline):
    from diffusers import DDIMScheduler

    with pytest.raises(ValueError, match="strength: got 1.5, expected a share from 0 to 1"):
        drawn(pipeline, "a", image=picture(), strength=1.5)
    with pytest.raises(ValueError, match="image: got 2 for 3 prompts, expected one, or one for each"):
        drawn(pipeline, ["a"] * 3, image=[picture()] * 2)
    with pytest.raises(ValueError, match=r"image: got float64 \(32, 32, 3\), expected a PIL image or uint8"):
        drawn(pipeline, "a", image=picture() / 255)
    with pytest.raises(ValueError, match=r"image: got str, expected a PIL image or uint8 \(H, W, 3\)"):
        drawn(pipeline, "a", image="picture.png")
    with pytest.raises(ValueError, match=r"image: got uint8 \(32, 32, 3\), expected uint8 \(40, 32, 3\)"):
        drawn(pipeline, "a", image=picture(), height=40)
    pipeline.scheduler, own = DDIMScheduler.from_config(pipeline.scheduler.config), pipeline.scheduler
    try:
        with pytest.raises(ValueError, match="image: got one with a scheduler of diffusers"):
            drawn(pipeline, "a", image=picture())
    finally:
        pipeline.scheduler = own


def test_a_prompt_of_several_contexts_is_read_to_its_end_when_asked_for(pipeline):
    from raphael.encoders.weighted import CutPromptWarning

    long = "a red ring, " * 6
    how = dataclasses.replace(pipeline.defaults, steps=2, long_prompts="chunks")
    ends = [drawn(pipeline, f"{long}{end}", sampling=how, **FREE) for end in ("blue", "green")]
    assert not np.array_equal(*ends)
    with pytest.warns(CutPromptWarning):
        assert np.array_equal(*(drawn(pipeline, f"{long}{end}") for end in ("blue", "green")))
    assert np.array_equal(
        drawn(pipeline, "a ring", sampling=how, **FREE), drawn(pipeline, "a ring", guidance_scale=4.0)
    )
    both = drawn(pipeline, ["a ring", f"{long}blue"], sampling=how, **FREE, latents=torch.ones(2, *SHAPE))
    alone = drawn(pipeline, "a ring", sampling=how, **FREE, latents=torch.ones(1, *SHAPE))
    np.testing.assert_allclose(both[0], alone[0], atol=1.01 / 255)
    negative = drawn(pipeline, "a ring", f"{long}blue", sampling=how, **FREE)
    assert not np.array_equal(negative, drawn(pipeline, "a ring", f"{long}green", sampling=how, **FREE))
    with pytest.raises(ValueError, match="collect: got true with long_prompts chunks, expected cut"):
        drawn(pipeline, "a ring", sampling=how, collect=True, **FREE)
