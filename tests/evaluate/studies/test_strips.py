"""The two strips against closed forms: what is shown is x_t, its ends are the image and the noise."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from truth.tiny_raphael import write_pipeline

from raphael.cli.main import main
from raphael.diffusion.noise import noise_of
from raphael.diffusion.prediction import prediction_of
from raphael.diffusion.sampling import ImageNoise, Parts, decode_images
from raphael.evaluate.studies.strips import forward_strip, reverse_strip, write_strips
from raphael.generate.pipeline import RaphaelPipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return write_pipeline(tmp_path_factory.mktemp("model") / "raphael")


@pytest.fixture(scope="module")
def pipeline(folder):
    return RaphaelPipeline.from_pretrained(folder)


def pixel_parts(pipeline: RaphaelPipeline) -> Parts:
    """Of a model of pixels: what is noised is what is seen."""
    from dataclasses import replace

    diffusion = replace(pipeline.diffusion, schedule="cosine", prediction="v", zero_terminal_snr=True)
    return Parts(None, noise_of(diffusion), prediction_of(diffusion), None, lambda x: x, (3, 16, 16))


def test_the_forward_strip_is_the_forward_equation_at_equal_steps_of_time(pipeline) -> None:
    parts, x0 = pixel_parts(pipeline), torch.full((1, 3, 16, 16), 0.25)
    noise = ImageNoise([(0, 0)], parts.latent_shape).start()
    strip = forward_strip(parts, x0, noise, 5)
    assert [panel.t for panel in strip] == [0, 250, 500, 749, 999]
    assert (strip[0].image == round((0.25 + 1) * 127.5)).all()
    for panel in strip[1:]:
        bar = float(parts.schedule.alpha_bar[int(panel.t)])
        x_t = (bar**0.5 * x0 + (1 - bar) ** 0.5 * noise).clamp(-1, 1)
        assert np.array_equal(panel.image, decode_images(parts, x_t)[0])
    assert strip[-1].sigma is None and np.array_equal(strip[-1].image, decode_images(parts, noise)[0])


def test_the_reverse_strip_ends_in_the_image_of_its_seed_and_begins_in_its_noise(pipeline) -> None:
    parts, settings = pipeline.parts(), pipeline.defaults
    noised, estimates, end = reverse_strip(parts, "a red circle", 7, settings, 4)
    image = np.asarray(pipeline("a red circle", seed=7).images[0])
    assert np.array_equal(noised[-1].image, image) and np.array_equal(decode_images(parts, end)[0], image)
    assert len(noised) == len(estimates) == 4
    levels = [panel.t for panel in noised]
    assert levels == sorted(levels, reverse=True) and levels[0] == 999
    start = ImageNoise([(7, 0)], parts.latent_shape).start()
    scale = float((1 + parts.schedule.sigma[-1] ** 2).sqrt())
    seen = decode_images(parts, start * scale / scale)[0]
    assert np.abs(noised[0].image.astype(int) - seen.astype(int)).max() <= 1
    assert np.array_equal(estimates[-1].image, image) and not np.array_equal(estimates[0].image, image)


def test_both_are_written_with_their_numbers(pipeline, tmp_path) -> None:
    files = write_strips(pipeline, tmp_path, "a star", 3)
    assert [file.name for file in files] == ["forward.png", "reverse.png"] and all(file.is_file() for file in files)
    told = json.loads((tmp_path / "strips.json").read_text())
    assert told["seed"] == 3 and told["model"] == pipeline.identity and told["sampling"]["steps"] == 30
    assert len(told["forward"]) == 8 and told["forward"][0] == {"t": 0.0, "sigma": 0.0}


def test_the_command_draws_them_of_any_system(folder, tmp_path, capsys) -> None:
    assert main(["figures", "--checkpoint", str(folder), "--out", str(tmp_path), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out
    assert "forward.png" in lines and "reverse.png" in lines and "figure5_words.png" in lines
