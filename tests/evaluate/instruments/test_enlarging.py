"""What is measured of a cascade's second network alone: against a naive loop, by enlargers whose result is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from truth.known_cascade import known_cascade

from data_pipeline.source.scene_probe import probe_set
from raphael.base.probe_set import ProbeSet
from raphael.diffusion.cascade import enlarged, shrunk
from raphael.evaluate.catalogue import metric_named, metric_of
from raphael.evaluate.instruments.enlarging import chosen, psnr
from raphael.evaluate.metric import measure
from raphael.evaluate.scenes.attributes import wrong_attributes
from raphael.evaluate.scenes.reader import read_scene
from raphael.evaluate.subject import Rules, Subject


@pytest.fixture(scope="module")
def scenes() -> ProbeSet:
    return probe_set(0, 4, 64, 0.12, ())


def subject_of(scenes: ProbeSet, enlarge) -> Subject:
    pipeline = known_cascade(enlarge)
    subject = Subject(Rules(), [], None)
    subject.__dict__ |= {"scenes": scenes, "pipeline": pipeline}
    subject.has = lambda need: True
    return subject


def as_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_bilinear_enlarging_gains_nothing_and_the_truth_gains_all(scenes: ProbeSet) -> None:
    rows = chosen(len(scenes))
    true = scenes.images[rows]

    def enlarge(low, places, level):
        return as_tensor(true[places]) if level == 0 else enlarged(low, 2)

    found = measure([metric_named("upsampler")], subject_of(scenes, enlarge)).flat()
    plain = ((enlarged(shrunk(as_tensor(true), 2), 2).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    by_hand = []
    for image, other in zip(true.astype(float), plain.numpy().astype(float), strict=True):
        by_hand.append(
            99.0 - (99.0 if (image == other).all() else 10 * np.log10(255**2 / ((image - other) ** 2).mean()))
        )
    assert found["psnr_over_bilinear"] == pytest.approx(np.mean(by_hand), abs=1e-4)
    low, high = found["psnr_over_bilinear_interval"]
    assert low < found["psnr_over_bilinear"] < high
    entries = scenes.entries()
    right = [not wrong_attributes(entries[row], read_scene(scenes.images[row])) for row in rows]
    assert found["enlarged_read_right"] == pytest.approx(np.mean(right), abs=1e-6)
    assert found["enlarged_read_right_n"] == len(rows) == found["upsampler"]["n"]
    clean, asked = found["upsampler"]["by_augmentation"]
    assert (clean["level"], asked["level"]) == (0.0, 0.25) and clean["psnr"] == 99.0
    assert asked["gain_db"] == 0.0 and asked["psnr"] == found["upsampler"]["bilinear"]["psnr"]
    assert found["upsampler"]["drawn"]["read_right"] == clean["read_right"]


def test_both_numbers_are_known_by_name_and_a_model_of_one_network_says_that_it_has_no_upsampler(scenes) -> None:
    assert {metric_of(name).name for name in ("psnr_over_bilinear", "enlarged_read_right")} == {"upsampler"}
    subject = subject_of(scenes, None)
    del subject.pipeline.enlarge
    found = metric_named("upsampler").compute(subject)
    assert found.absent == {"upsampler": "the model has no upsampler"} and not found.numbers


def test_rows_are_spread_over_all_scenes_and_psnr_is_of_bytes() -> None:
    assert chosen(3) == [0, 1, 2] and chosen(256) == list(range(0, 256, 2)) and len(chosen(1000)) == 128
    black, grey = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 51, np.uint8)
    assert psnr(black, grey) == pytest.approx(20 * np.log10(5)) and psnr(grey, grey) == 99.0
