"""Marks are drawn where the mask says, scores survive a file, the threshold is where F1 is best."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.score.watermark_net import WatermarkModel, WatermarkNet, load_watermark, loss, sized
from data_pipeline.tools import watermark_model
from data_pipeline.tools.watermarks import KINDS, draw
from raphael.base.stage import StageError


def grey(width: int = 240, height: int = 160) -> Image.Image:
    return Image.new("RGB", (width, height), (120, 120, 120))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unseen", [False, True])
def test_a_mark_changes_the_image_where_the_mask_is_and_nowhere_else(kind, unseen):
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
    return WatermarkModel(WatermarkNet((4, 4, 8)))


def test_scores_are_the_same_from_a_file_and_in_any_batch(model, tmp_path):
    images = [draw(grey(), KINDS[seed % 5], random.Random(seed))[0] for seed in range(5)]
    scores = model.scores(images)
    model.save(tmp_path / "marks.safetensors")
    loaded = load_watermark(tmp_path / "marks.safetensors")
    assert np.array_equal(loaded.scores(images), scores) and model.scores([]).shape == (0,)
    alone = np.concatenate([loaded.scores([image]) for image in images])
    assert scores == pytest.approx(alone, abs=1e-6) and (0 < scores).all() and (scores < 1).all()
    (tmp_path / "other.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(StageError, match="other.safetensors: not a watermark detector"):
        load_watermark(tmp_path / "other.safetensors")


def test_the_threshold_is_where_recall_less_false_alarms_is_largest():
    """The truth: both shares at every possible threshold, image by image."""
    rng = np.random.default_rng(0)
    marked = np.array([kind != "" for _ in range(8) for kind in ["", *KINDS]])
    logits = np.array([rng.normal(0.5 if mark else 0.0, 0.5) for mark in marked])

    def gain(flagged: np.ndarray) -> float:
        hits = sum(bool(flag) for flag, mark in zip(flagged, marked, strict=True) if mark)
        alarms = sum(bool(flag) for flag, mark in zip(flagged, marked, strict=True) if not mark)
        return hits / 40 - alarms / 8

    found, threshold = watermark_model.best_threshold(logits, marked)
    best = max(gain(logits >= value) for value in logits)
    assert gain(logits > threshold) == pytest.approx(best) and found == pytest.approx(best)


def test_the_chosen_threshold_is_a_score_of_one_half(model):
    noises = [np.random.default_rng(seed).integers(0, 255, (40, 48, 3), np.uint8) for seed in range(3)]
    photographs = [Image.fromarray(noise) for noise in noises]
    watermark_model.choose_threshold(model, photographs)
    images, kinds, _ = watermark_model.examination(photographs, 1, unseen=False)
    scores = model.scores(images)
    sharpness = float(model.net.sharpness)
    assert sharpness in watermark_model.SHARPNESSES and len(kinds) == 18
    (places,) = model.maps(images[:1])
    naive = np.log(np.mean(np.exp(sharpness * places.double().numpy()))) / sharpness - float(model.net.shift)
    assert scores[0] == pytest.approx(1 / (1 + np.exp(-naive)), abs=1e-5) and (scores >= 0.5).any()
    model.net.sharpness, model.net.shift = torch.ones(()), torch.zeros(())


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    assert watermark_model.auc(np.array([3.0, 1.0]), np.array([2.0, 1.0, 0.0])) == pytest.approx((3 + 1.5) / 6)


def test_images_keep_their_shape_and_are_never_enlarged():
    assert sized(grey(1024, 512)).shape == (256, 512, 3) and sized(grey(96, 100)).shape == (96, 96, 3)
    assert sized(grey(3, 3)).shape == (8, 8, 3)


def test_places_where_a_mark_cannot_be_seen_are_not_judged():
    places = torch.zeros(1, 2, 2, requires_grad=True)
    masks = torch.tensor([[[1.0, 0.0], [float("nan"), 0.0]]])
    loss(places.flatten(1).mean(1), places, torch.ones(1), masks).backward()
    alone = torch.zeros(1, 2, 2, requires_grad=True)
    (0.1 * torch.nn.functional.softplus(-alone.mean())).backward()
    assert places.grad[0, 1, 0] == alone.grad[0, 1, 0] and places.grad[0, 0, 0] < alone.grad[0, 0, 0]


def test_a_detector_at_chance_is_refused():
    watermark_model.refuse_chance({"all": {"recall": 0.8}, "false_alarms": 0.1})
    with pytest.raises(StageError, match="flags 99.1% of marked and 98.8% of clean .* teach more images"):
        watermark_model.refuse_chance({"all": {"recall": 0.991}, "false_alarms": 0.988})


def test_a_batch_holds_each_window_with_and_without_its_mark_and_says_where_it_is():
    images, marked, masks = next(watermark_model._batches([grey(300, 200)], 1, random.Random(0)))
    assert images.shape == (16, 3, 96, 96) and images.dtype == torch.uint8 and masks.shape == (16, 12, 12)
    assert marked.tolist() == [0.0, 1.0] * 8 and masks[::2].sum() == 0
    assert (masks[1::2].nan_to_num().sum((1, 2)) > 0).all()
    change = (images[1::2].float() - images[::2].float()).abs().amax(1)
    cells = torch.nn.functional.max_pool2d(change[:, None], 8)[:, 0]
    assert cells[masks[1::2] == 1].min() > 2 and cells[masks[1::2] == 0].float().mean() < 2  # JPEG rings a little
    assert [len(part) for part in watermark_model.split(list(range(10)))] == [6, 1, 3]
