import math
from dataclasses import replace

import pytest
import torch
from truth.closed_form_diffusion import COND, starts

from raphael.base.config.preset import DiffusionConfig
from raphael.diffusion.denoiser import NetworkDenoiser
from raphael.diffusion.noise import noise_of
from raphael.diffusion.prediction import Edm, Eps, Flow, Sample, Velocity, prediction_of, training_pair

NOISES = {
    "discrete": DiffusionConfig(1000, "scaled_linear", 0.00085, 0.012, "v", False),
    "zero terminal SNR": DiffusionConfig(1000, "linear", 1e-4, 0.02, "v", True),
    "edm": DiffusionConfig(1000, "edm", 1e-4, 0.02, "v", False),
    "rectified flow": DiffusionConfig(1000, "rectified_flow", 1e-4, 0.02, "v", True),
}
PREDICTIONS = {"eps": Eps(), "v": Velocity(), "x0": Sample(), "flow": Flow(), "edm": Edm(0.5)}
TIMES = torch.tensor([0, 1, 10, 400, 800, 998, 999])


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_that_returns_its_target_is_a_denoiser_that_returns_x0_at_every_noise(noise, prediction):
    noise, kind = noise_of(NOISES[noise]), PREDICTIONS[prediction]
    if kind.blind and noise.zero_terminal_snr:
        with pytest.raises(ValueError, match="got eps with zero_terminal_snr"):
            NetworkDenoiser(torch.nn.Identity(), noise, kind)
        return
    x0, eps = starts(len(TIMES), 2), starts(len(TIMES), 3)
    given, target = training_pair(kind, noise, x0, eps, TIMES)

    class Knowing(torch.nn.Module):
        def forward(self, x, timestep, *condition, **options):
            torch.testing.assert_close(timestep, TIMES.float(), rtol=0, atol=1e-3)
            torch.testing.assert_close(x, given, rtol=0, atol=1e-9)
            output = type("Output", (), {})()
            output.prediction = target
            return output

    signal, spread = noise.roots(TIMES, x0)
    sigma = (spread / signal).flatten()
    x = torch.where(signal == 0, eps, x0 + spread / signal * eps)
    estimate = NetworkDenoiser(Knowing(), noise, kind)(x, sigma, COND)
    torch.testing.assert_close(estimate, x0, rtol=0, atol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_error_of_the_output_is_an_error_of_x0_in_the_stated_ratio(prediction):
    kind, sigma = PREDICTIONS[prediction], torch.tensor([0.01, 0.3, 1.0, 7.0, 100.0], dtype=torch.float64)
    output, x, sigma_ = starts(5, 1), starts(5, 2), sigma.view(-1, 1, 1, 1)
    off = kind.estimate(output + 0.25, x, sigma_) - kind.estimate(output, x, sigma_)
    squares = off.square().mean((1, 2, 3))
    torch.testing.assert_close(0.25**2 / squares, kind.error_of_x0(sigma**-2))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("noise", NOISES)
def test_edm_gives_the_network_input_and_target_of_variance_one(noise, sigma_data):
    """For independent x_0 of deviation sigma_data and eps: a linear form's variance from its two coefficients."""
    noise, kind = noise_of(NOISES[noise]), Edm(sigma_data)
    one, nothing = torch.ones(len(TIMES), 1, 1, 1, dtype=torch.float64), torch.zeros(len(TIMES), 1, 1, 1)
    nothing = nothing.double()
    of_x0, of_eps = (training_pair(kind, noise, *pair, TIMES) for pair in ((one, nothing), (nothing, one)))
    for by_x0, by_eps in zip(of_x0, of_eps, strict=True):
        torch.testing.assert_close(sigma_data**2 * by_x0**2 + by_eps**2, one)


def test_edm_is_the_papers_preconditioning_and_that_of_diffusers():
    """arXiv 2206.00364, table 1, by hand; D = c_skip x + c_out F, so F = 0 gives c_skip x."""
    from diffusers import EDMEulerScheduler

    for sigma, sigma_data in ((0.002, 0.5), (0.7, 0.5), (80.0, 0.5), (3.0, 1.7)):
        kind, x, output = Edm(sigma_data), starts(2, 1), starts(2, 2)
        sigma_ = torch.full((2, 1, 1, 1), sigma, dtype=torch.float64)
        total = sigma**2 + sigma_data**2
        skip, out = sigma_data**2 / total, sigma * sigma_data / math.sqrt(total)
        torch.testing.assert_close(kind.estimate(torch.zeros_like(output), x, sigma_), skip * x)
        ours = kind.estimate(output, x, sigma_)
        torch.testing.assert_close(ours, skip * x + out * output)
        peer = EDMEulerScheduler(sigma_data=sigma_data)
        torch.testing.assert_close(ours, peer.precondition_outputs(x, output, torch.tensor(sigma).double()))
        signal, spread = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
        given = kind.network_input(x * signal, torch.tensor(signal).double(), torch.tensor(spread).double())
        torch.testing.assert_close(given, x / math.sqrt(total))
        torch.testing.assert_close(given, peer.precondition_inputs(x, torch.tensor(sigma).double()))


def test_edm_of_data_of_variance_one_is_minus_v():
    noise, x0, eps = noise_of(NOISES["zero terminal SNR"]), starts(len(TIMES), 1), starts(len(TIMES), 2)
    (given, target), (v_given, v) = (training_pair(kind, noise, x0, eps, TIMES) for kind in (Edm(1.0), Velocity()))
    torch.testing.assert_close(given, v_given)
    torch.testing.assert_close(target, -v)


def test_flow_sees_the_straight_line_and_returns_its_direction():
    noise, x0, eps = noise_of(NOISES["rectified flow"]), starts(len(TIMES), 1), starts(len(TIMES), 2)
    given, target = training_pair(Flow(), noise, x0, eps, TIMES)
    time = (TIMES / 999).view(-1, 1, 1, 1)
    torch.testing.assert_close(given, (1 - time) * x0 + time * eps, rtol=0, atol=1e-7)
    assert torch.equal(target, eps - x0)


@pytest.mark.parametrize(("name", "theirs"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_an_estimate_is_the_predicted_original_sample_of_diffusers(name, theirs):
    from diffusers import DDIMScheduler

    noise, output, x_vp = noise_of(NOISES["discrete"]), starts(4, 1), starts(4, 2)
    peer = DDIMScheduler(1000, prediction_type=theirs, clip_sample=False)
    peer.alphas_cumprod = noise.alpha_bar
    peer.set_timesteps(1000)
    for t in (0, 500, 999):
        found = peer.step(output, t, x_vp).pred_original_sample
        sigma = noise.sigma[t].view(1, 1, 1, 1)
        ours = PREDICTIONS[name].estimate(output, x_vp * (1 + sigma**2).sqrt(), sigma)
        torch.testing.assert_close(ours, found)


def test_settings_name_the_predictions():
    config = NOISES["discrete"]
    for name, kind in PREDICTIONS.items():
        assert type(prediction_of(replace(config, prediction=name))) is type(kind)
    assert prediction_of(replace(config, prediction="edm", sigma_data=0.7)) == Edm(0.7)
