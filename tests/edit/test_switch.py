"""Prompt switching: both ends are the prompts' own images, and between them each prompt has its share of the steps."""

import numpy as np
import pytest
import torch
from truth.tiny_raphael import write_pipeline

from raphael.base.config.preset import DiffusionConfig
from raphael.base.config.sampling import Sampling
from raphael.diffusion.samplers import sample
from raphael.diffusion.schedule import Schedule
from raphael.edit.run import How
from raphael.edit.switch import Switched, switch
from raphael.generate.pipeline import RaphaelPipeline
from raphael.net.condition import Condition

DIFFUSION = DiffusionConfig(1000, "scaled_linear", 0.00085, 0.012, "v", True)
FIRST, SECOND = "a red circle on blue", "a green star on a yellow background"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    torch.set_num_threads(1)
    return RaphaelPipeline.from_pretrained(write_pipeline(tmp_path_factory.mktemp("model") / "raphael"))


def how(steps=4, **changes):
    return How(seed=3, num_images=2, sampling=Sampling(steps=steps, guidance_scale=2.0, **changes))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "euler_ancestral"])
def test_at_either_end_it_is_one_prompts_own_image_to_the_bit(pipeline, sampler):
    asked = how(sampler=sampler)
    for share, prompt in ((0.0, SECOND), (1.0, FIRST)):
        edited = switch(pipeline, FIRST, SECOND, share, asked)
        own = edited.source if prompt == FIRST else edited.without
        assert np.array_equal(edited.result, own)
        plain = pipeline([prompt] * 2, sampling=asked.sampling, seed=3, output_type="np").images
        assert np.abs(plain * 255 - own).max() <= 1.01  # another batch size: kernels round by it


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_each_prompt_is_told_for_its_share_of_the_steps(share):
    told = []

    def denoiser(x, sigma, cond):
        told.append(cond.vector.flatten().tolist())
        return x * 0

    schedule = Schedule(DIFFUSION)
    first, second = (Condition(vector=torch.full((2, 1), value)) for value in (1.0, 2.0))
    switched = Switched(denoiser, schedule, second, (share, 2.0))
    settings = Sampling(steps=4, sampler="euler")
    sample(settings, switched, torch.zeros(2, 1, 1, 1), schedule.sampling_sigmas(4), first, None)
    early = int(4 * share)
    assert told == [[1.0, 1.0]] * early + [[2.0, 1.0]] * (4 - early)


def test_a_pair_does_not_depend_on_its_neighbours(pipeline):
    both = switch(pipeline, FIRST, SECOND, 0.5, how())
    assert not np.array_equal(both.result, both.without) and not np.array_equal(both.result, both.source)
    other = How(seed=3, num_images=3, sampling=how().sampling)
    more = switch(pipeline, FIRST, SECOND, 0.5, other)
    assert np.abs(more.result[:2].astype(int) - both.result).max() <= 1


def test_a_share_outside_0_to_1_is_refused(pipeline):
    with pytest.raises(ValueError, match="share: got 1.5, expected a share from 0 to 1"):
        switch(pipeline, FIRST, SECOND, 1.5)
