import dataclasses
import math

import pytest
import torch
from truth.closed_form_diffusion import COND, starts

from raphael.diffusion.guidance import ClassifierFreeGuidance, Thresholded, dynamic_threshold
from raphael.net.condition import Condition

NULL = Condition(torch.full((1, 1, 1), -1.0), torch.ones(1, 1, dtype=torch.bool))


def two(count=3):
    return Condition(torch.full((count, 1, 1), 2.0), torch.ones(count, 1, dtype=torch.bool))


class Counting:
    """x_0 = x + the condition's number; remembers the batch sizes it was called with."""

    def __init__(self):
        self.sizes = []

    def __call__(self, x, sigma, cond):
        self.sizes.append(len(x))
        return x + cond.tokens.view(-1, 1, 1, 1)


def test_guidance_is_the_affine_combination_and_skips_the_branch_it_does_not_need():
    denoiser, x, sigma = Counting(), torch.zeros(3, 1, 2, 2), torch.ones(3)
    values = [ClassifierFreeGuidance(denoiser, s, NULL)(x, sigma, two()).unique().tolist() for s in (0.0, 1.0, 4.0)]
    assert values == [[-1.0], [2.0], [-1.0 + 4.0 * 3.0]]
    assert denoiser.sizes == [3, 3, 6]


@pytest.mark.parametrize(("sigma", "guided"), [(0.1, False), (0.5, True), (1.0, True), (3.0, True), (3.1, False)])
def test_outside_its_interval_guidance_is_one_forward_of_the_conditional_branch(sigma, guided):
    denoiser, x = Counting(), torch.zeros(3, 1, 2, 2)
    guidance = ClassifierFreeGuidance(denoiser, 4.0, NULL, (0.5, 3.0))
    value = guidance(x, torch.full((3,), sigma), two()).unique().tolist()
    assert (value, denoiser.sizes) == (([11.0], [6]) if guided else ([2.0], [3]))


def test_an_open_interval_holds_infinite_noise_and_samples_of_one_batch_may_differ():
    x = torch.zeros(3, 1, 2, 2)
    guidance = ClassifierFreeGuidance(Counting(), 4.0, NULL, (0.5, math.inf))
    value = guidance(x, torch.tensor([0.1, 2.0, math.inf]), two())
    assert value[:, 0, 0, 0].tolist() == [2.0, 11.0, 11.0]
    ignoring = ClassifierFreeGuidance(Counting(), 0.0, NULL, (0.5, math.inf))
    assert ignoring(x, torch.tensor([0.1, 2.0, math.inf]), two())[:, 0, 0, 0].tolist() == [2.0, -1.0, -1.0]


def test_a_picture_is_told_to_both_branches_and_not_guided_by():
    class Seeing(Counting):
        def __call__(self, x, sigma, cond):
            return super().__call__(x, sigma, cond) + cond.picture

    x, picture = torch.zeros(3, 1, 2, 2), torch.arange(12.0).view(3, 1, 2, 2)
    cond = dataclasses.replace(two(), picture=picture)
    plain = ClassifierFreeGuidance(Counting(), 4.0, NULL)(x, torch.ones(3), two())
    assert torch.equal(ClassifierFreeGuidance(Seeing(), 4.0, NULL)(x, torch.ones(3), cond), plain + picture)
    unconditional = ClassifierFreeGuidance(Seeing(), 0.0, NULL)(x, torch.ones(3), cond)
    assert torch.equal(unconditional, picture - 1)
    own = dataclasses.replace(NULL, picture=torch.zeros(1, 1, 2, 2))
    assert torch.equal(ClassifierFreeGuidance(Seeing(), 4.0, own)(x, torch.ones(3), cond), plain + 4 * picture)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescaled_guidance_agrees_with_diffusers_and_leaves_the_unguided_branch(share):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    x, sigma = starts(3, 1), torch.tensor([0.1, 1.0, 1.0])
    values = {2.0: starts(3, 2), -1.0: starts(3, 3)}

    def denoiser(x, sigma, cond):
        return torch.cat([values[float(cond.tokens[row, 0, 0])] for row in range(0, len(x), 3)])

    guided = ClassifierFreeGuidance(denoiser, 4.0, NULL, rescale=share)(x, sigma, two())
    plain = ClassifierFreeGuidance(denoiser, 4.0, NULL)(x, sigma, two())
    torch.testing.assert_close(guided, rescale_noise_cfg(plain, values[2.0], share))
    assert not torch.allclose(guided, plain)
    if share == 1.0:
        torch.testing.assert_close(guided.std((1, 2, 3)), values[2.0].std((1, 2, 3)))
    outside = ClassifierFreeGuidance(denoiser, 4.0, NULL, (0.5, 3.0), share)(x[:3], sigma * 0 + 0.1, two())
    assert torch.equal(outside, values[2.0])


def naive_percentile(values, percentile):
    """Linear interpolation between order statistics, by hand."""
    ordered = sorted(values)
    position = percentile / 100 * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


@pytest.mark.parametrize("bound", [1.0, 2.5])
@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.5, 100.0])
def test_dynamic_thresholding_equals_a_loop_over_samples_and_pixels(percentile, bound):
    x0 = starts(5, seed=4) * torch.tensor([0.1, 0.5, 1.0, 2.0, 9.0], dtype=torch.float64).view(-1, 1, 1, 1)
    expected = torch.empty_like(x0)
    for i, sample in enumerate(x0):
        s = max(naive_percentile([abs(value) for value in sample.flatten().tolist()], percentile), bound)
        pixels = [min(max(value, -s), s) / s * bound for value in sample.flatten().tolist()]
        expected[i] = torch.tensor(pixels, dtype=torch.float64).view_as(sample)
    torch.testing.assert_close(dynamic_threshold(x0, percentile, bound), expected, rtol=1e-12, atol=0)
    assert dynamic_threshold(x0, percentile, bound).abs().max() <= bound * (1 + 1e-12)


def test_dynamic_thresholding_agrees_with_diffusers():
    from diffusers import DDIMScheduler

    x0 = (starts(5, seed=4) * 3).float()
    peer = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e6)
    torch.testing.assert_close(dynamic_threshold(x0, 90.0), peer._threshold_sample(x0))


def test_what_lies_inside_the_bound_is_left_alone_and_half_precision_keeps_its_type():
    x0 = starts().clamp(-0.9, 0.9)
    assert torch.equal(dynamic_threshold(x0), x0)
    halved = dynamic_threshold((starts() * 5).bfloat16())
    assert halved.dtype == torch.bfloat16 and halved.abs().max() <= 1.01


def test_static_thresholding_clips_the_guided_estimate():
    x, sigma = torch.tensor([-9.0, -1.0, 0.5, 7.0]).view(1, 1, 2, 2), torch.ones(1)
    denoiser = ClassifierFreeGuidance(lambda x, sigma, cond: x, 3.0, NULL)
    assert Thresholded(denoiser, "static")(x, sigma, COND).flatten().tolist() == [-1.0, -1.0, 0.5, 1.0]
    assert Thresholded(denoiser, "static", bound=5.0)(x, sigma, COND).flatten().tolist() == [-5.0, -1.0, 0.5, 5.0]
    dynamic = Thresholded(denoiser, "dynamic", 100.0)(x, sigma, COND)
    torch.testing.assert_close(dynamic, x / 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [(("soft",), "threshold: got 'soft'"), (("dynamic", 101.0), "got 101"), (("static", 99.0, 0.0), "got 0")],
)
def test_a_threshold_that_means_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Thresholded(lambda x, sigma, cond: x, *settings)
