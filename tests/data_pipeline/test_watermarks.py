"""Marks are drawn where the mask says, scores survive a file, the threshold is where F1 is best."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline import watermark_model
from data_pipeline.watermark_net import SIDE_PX, WatermarkModel, WatermarkNet, load_watermark
from data_pipeline.watermarks import KINDS, draw
from raphael.stage import StageError


def grey(width: int = 240, height: int = 160) -> Image.Image:
    return Image.new("RGB", (width, height), (120, 120, 120))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unseen", [False, True])
def test_a_mark_changes_the_picture_where_the_mask_is_and_nowhere_else(kind, unseen):
    for seed in range(4):
        random.seed(99)
        marked, mask = draw(grey(), kind, random.Random(seed), unseen)
        changed = (np.asarray(marked) != 120).any(2)
        covered = np.asarray(mask) > 0
        shift = np.zeros_like(covered)  # a shadow falls one pixel to the right and below
        shift[1:, 1:] = covered[:-1, :-1]
        assert changed.sum() > 30 and not (changed & ~(covered | shift)).any()
        again, _ = draw(grey(), kind, random.Random(seed), unseen)
        assert again.tobytes() == marked.tobytes()


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="kind: got 'sticker', expected one of text, tiled, logo, veil, stamp"):
        draw(grey(), "sticker", random.Random(0))


@pytest.fixture(scope="module")
def model() -> WatermarkModel:
    torch.manual_seed(0)
    return WatermarkModel(WatermarkNet((4, 4, 8, 8)))


def test_scores_are_the_same_from_a_file_and_in_any_batch(model, tmp_path):
    pictures = [draw(grey(), KINDS[seed % 5], random.Random(seed))[0] for seed in range(5)]
    scores = model.scores(pictures)
    model.save(tmp_path / "marks.safetensors")
    loaded = load_watermark(tmp_path / "marks.safetensors")
    assert np.array_equal(loaded.scores(pictures), scores) and model.scores([]).shape == (0,)
    alone = np.concatenate([loaded.scores([picture]) for picture in pictures])
    assert scores == pytest.approx(alone, abs=1e-6) and (0 < scores).all() and (scores < 1).all()
    (tmp_path / "other.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(StageError, match="other.safetensors: not a watermark detector"):
        load_watermark(tmp_path / "other.safetensors")


def test_the_threshold_is_where_f1_is_best(monkeypatch, model):
    """The truth: F1 at every possible threshold, one at a time, with five marked pictures weighing as one."""
    rng = np.random.default_rng(0)
    kinds = ["", *KINDS] * 8
    scores = np.array([rng.normal(0.5 if kind else 0.0, 0.5) for kind in kinds])
    monkeypatch.setattr(watermark_model, "examination", lambda *a, **k: ([None] * len(kinds), kinds, []))
    stub = type("Stub", (), {})()
    stub.scores, stub.net = lambda pictures: 1 / (1 + np.exp(-scores)), type("Net", (), {"shift": 0.0})()
    watermark_model.choose_threshold(stub, [])

    def f1(flagged: np.ndarray) -> float:
        hits = sum(bool(flag) / 5 for flag, kind in zip(flagged, kinds, strict=True) if kind)
        alarms = sum(bool(flag) for flag, kind in zip(flagged, kinds, strict=True) if not kind)
        return 2 * hits / (hits + alarms + 8)

    best = max(f1(scores >= value) for value in scores)
    assert f1(scores > stub.net.shift) == pytest.approx(best)


def test_a_detector_at_chance_is_refused():
    watermark_model.refuse_chance({"all": {"recall": 0.8}, "false_alarms": 0.1})
    with pytest.raises(StageError, match="flags 99.1% of marked and 98.8% of clean .* teach more pictures"):
        watermark_model.refuse_chance({"all": {"recall": 0.991}, "false_alarms": 0.988})


def test_a_batch_holds_each_crop_with_and_without_its_mark():
    pictures = [grey(300, 200)]
    images, marked, masks = next(watermark_model._batches(pictures, 1, random.Random(0)))
    assert images.shape == (32, 3, SIDE_PX, SIDE_PX) and images.dtype == torch.uint8
    assert marked.tolist() == [0.0, 1.0] * 16 and masks[::2].sum() == 0 and (masks[1::2].sum((1, 2)) > 0).all()
    assert [len(part) for part in watermark_model.split(list(range(10)))] == [6, 1, 3]
