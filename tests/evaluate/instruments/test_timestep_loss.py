"""The denoising loss by timestep against a naive loop, and which scenes it is of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from truth.tiny_ddpm import CLASSES, write_ddpm
from truth.tiny_raphael import write_pipeline

from data_pipeline.source.scene_probe import probe_set
from raphael.base.probe_set import ProbeSet
from raphael.evaluate.instruments.measured import timestep_loss, tracked
from raphael.evaluate.instruments.timestep_loss import chosen, timestep_losses, timesteps
from raphael.evaluate.subject import Rules, Subject
from raphael.generate.pipeline import RaphaelPipeline
from raphael.net.condition import Condition
from raphael.net.latents import sample_latents


@pytest.fixture(scope="module")
def scenes() -> ProbeSet:
    return probe_set(0, 20, 64, 0.12, ())


def velocity_loss(pipeline: RaphaelPipeline, x0: torch.Tensor, index: int, t: int, told: Condition) -> float:
    """(v - v_hat)^2 of one x_0 by the noise of generator seed `index`, from alpha_bar."""
    noise = torch.randn(x0.shape[1:], generator=torch.Generator().manual_seed(index))[None]
    alpha_bar = pipeline.schedule.alpha_bar[t]
    noised = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
    velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
    output = pipeline.unet(noised.float(), torch.tensor([float(t)]), told)
    return (output.prediction - velocity).square().mean().item()


@torch.inference_mode()
def test_of_a_model_by_texts_it_is_the_square_error_told_the_captions(tmp_path, scenes) -> None:
    pipeline = RaphaelPipeline.from_pretrained(write_pipeline(tmp_path / "model"))
    images, texts = chosen(pipeline, scenes, 5)
    assert texts == [scenes.captions[index * len(scenes) // 5] for index in range(5)]
    images = images[:, :32, :32]
    found = timestep_losses(pipeline, images, texts, bins=4)
    assert timesteps(pipeline, 4) == [125, 375, 625, 875] and found.shape == (5, 4)
    for i, text in enumerate(texts):
        image = torch.from_numpy(images[i : i + 1]).permute(0, 3, 1, 2) / 127.5 - 1
        autoencoder = pipeline.autoencoder
        x0 = sample_latents(autoencoder.encode_moments(image), autoencoder.scaling_factor, autoencoder.shift)
        expected = velocity_loss(pipeline, x0, i, 625, pipeline.encode([text]))
        assert found[i, 2].item() == pytest.approx(expected, rel=1e-4)


@torch.inference_mode()
def test_of_a_model_of_classes_it_is_of_scenes_that_show_one_and_told_that(tmp_path, scenes) -> None:
    pipeline = RaphaelPipeline.from_pretrained(write_ddpm(tmp_path / "model"))
    images, labels = chosen(pipeline, scenes, 7)
    shown = {
        text: [t["objects"] for t, c in zip(scenes.truths, scenes.captions) if c == text] for text in scenes.captions
    }
    single = {text for text, objects in shown.items() if {len(one) for one in objects} == {1}}
    assert len(labels) == 7 and set(labels) <= set(CLASSES)
    for image, label in zip(images, labels, strict=True):
        row = next(row for row in range(len(scenes)) if np.array_equal(scenes.images[row], image))
        assert scenes.captions[row] in single and scenes.truths[row]["objects"][0]["shape"] == label
    found = timestep_losses(pipeline, images, labels, bins=2)
    for i, label in enumerate(labels):
        by_area = images[i].reshape(32, 2, 32, 2, 3).mean((1, 3)).round()  # 64 px at 32: as training saw them
        x0 = torch.from_numpy(by_area).permute(2, 0, 1)[None].float() / 127.5 - 1
        one_hot = torch.tensor([[float(name == label) for name in CLASSES]])
        expected = velocity_loss(pipeline, x0, i, 250, Condition(vector=one_hot))
        assert found[i, 0].item() == pytest.approx(expected, rel=1e-2)  # a level of 255 may round the other way


def test_an_unconditional_model_is_judged_on_all_scenes(tmp_path, scenes) -> None:
    pipeline = RaphaelPipeline.from_pretrained(write_ddpm(tmp_path / "model", classes=()))
    images, labels = chosen(pipeline, scenes, 10**6)
    assert len(images) == len(scenes) and set(labels) == {""}
    assert timestep_losses(pipeline, images[:2], labels[:2], bins=2).shape == (2, 2)


def test_the_metric_is_the_mean_with_its_interval_and_tells_every_timestep(tmp_path, scenes) -> None:
    subject = Subject(Rules(), [], None)
    subject.pipeline = RaphaelPipeline.from_pretrained(write_ddpm(tmp_path / "model"))  # type: ignore[misc]
    subject.scenes = scenes  # type: ignore[misc]
    found = timestep_loss(subject)
    (number,) = found.numbers
    told = found.facts["timestep_losses"]
    assert told["timesteps"] == [50 + 100 * index for index in range(10)] and told["n"] <= len(scenes)
    assert number.value == pytest.approx(np.mean(told["losses"]), abs=1e-5) and number.low < number.value < number.high
    assert tracked(found.facts)["timestep_loss/t0450"] == told["losses"][4]
