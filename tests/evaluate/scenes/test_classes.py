"""Classes read off images: the share that is right, chance beside it, and the ceiling of drawn truth."""

import itertools

import numpy as np
import pytest

from raphael.evaluate.catalogue import metrics_named
from raphael.evaluate.metric import measure
from raphael.evaluate.metrics.intervals import wilson
from raphael.evaluate.scenes.classes import area_downsampled, chance_of, label_prompts
from raphael.evaluate.scenes.reader import SHAPES
from raphael.evaluate.subject import SCENES, Rules, Subject

DRAWN = ("circle", "square", "triangle", "star", "cross", "heart")  # of the corpus


@pytest.fixture(scope="module")
def probe():
    from data_pipeline.source.scene_probe import probe_set

    return probe_set(0, 60, 64, 0.12, ())


class Drawn(Subject):
    """Single-object scenes of the probe as the images of a model that is asked for `labels`."""

    def __init__(self, probe, side_px, labels=None, count=48):
        self.rows = [row for row, suite in enumerate(probe.suites) if suite == "single"][:count]
        shown = [probe.truths[row]["objects"][0]["shape"] for row in self.rows]
        labels = shown if labels is None else labels
        super().__init__(Rules(), [{"prompt": name, "label": name} for name in labels], list(labels))
        self.scenes, self.side_px, self.shown = probe, side_px, shown

    def has(self, need):
        return need == SCENES or super().has(need)

    def images(self):
        return (area_downsampled(self.scenes.images[row], self.side_px) for row in self.rows)


def classes(subject):
    found = measure(metrics_named(["class_accuracy", "class_ceiling"]), subject)
    return found.flat(), found.absent


def test_prompts_of_classes_are_every_label_with_each_seed_and_chance_spreads_over_them():
    prompts = label_prompts(["circle", "star"], range(3))
    assert [(entry["prompt"], entry["label"], entry["seed"]) for entry in prompts] == [
        ("circle", "circle", 0), ("star", "star", 0), ("circle", "circle", 1), ("star", "star", 1),
        ("circle", "circle", 2), ("star", "star", 2),
    ]  # fmt: skip


def test_chance_is_the_share_of_right_pairs_of_different_images():
    rng = np.random.default_rng(0)
    asked = [str(DRAWN[i]) for i in rng.integers(0, 6, 15)]
    read = [None if i == 6 else str(DRAWN[i]) for i in rng.integers(0, 7, 15)]
    pairs = [asked[a] == read[b] for a, b in itertools.permutations(range(15), 2)]
    assert chance_of(asked, read) == pytest.approx(sum(pairs) / len(pairs), abs=1e-15)
    assert chance_of(["star"], ["star"]) is None


@pytest.mark.parametrize("side_px", [64, 32])
def test_drawn_truth_is_read_right_at_its_size_and_area_downsampled_to_half(probe, side_px):
    """The ceiling that no model of that size is above; 600 of 600 fresh scenes at 32 px."""
    facts, absent = classes(Drawn(probe, side_px))
    assert facts["class_accuracy"] == 1.0 and facts["class_accuracy_n"] == 48
    assert facts["class_accuracy_ceiling"] >= 0.98 and facts["class_accuracy_ceiling_n"] == 60
    assert 0.1 < facts["chance"]["class_accuracy"] < 0.25 and not absent


def test_half_the_labels_exchanged_is_half_wrong_with_wilsons_interval(probe):
    subject = Drawn(probe, 32)
    exchanged = [DRAWN[(DRAWN.index(name) + 1) % 6] if place % 2 else name for place, name in enumerate(subject.shown)]
    facts, _ = classes(Drawn(probe, 32, exchanged))
    low, high = wilson(24, 48)
    assert facts["class_accuracy"] == 0.5
    assert (facts["class_accuracy_low"], facts["class_accuracy_high"]) == (round(low, 6), round(high, 6))
    by_label = facts["class_accuracy_by_label"]
    assert sum(row["value_n"] for row in by_label.values()) == 48
    assert sum(row["value"] * row["value_n"] for row in by_label.values()) == pytest.approx(24)


def test_labels_that_are_no_shapes_have_no_reader_and_the_number_is_absent(probe):
    facts, absent = classes(Drawn(probe, 32, ["tabby cat"] * 48))
    assert "class_accuracy" not in facts and "'tabby cat' is no shape" in absent["class_accuracy"]
    assert "no drawn scene" in absent["class_ceiling"]
    assert set(DRAWN) < set(SHAPES)


def test_images_that_the_reader_cannot_read_are_absent_with_the_size_and_no_error(probe, tmp_path):
    from PIL import Image

    from raphael.evaluate.report.sections import gallery

    subject = Drawn(probe, 16)
    facts, absent = classes(subject)
    assert "class_accuracy" not in facts
    for name in ("class_accuracy", "class_ceiling"):
        assert absent[name] == "images of 16 x 16 px are too small for the scene reader, which needs 32 px a side"
    Image.fromarray(next(subject.images())).save(tmp_path / "0.png")
    (suite,) = gallery(tmp_path, [{**subject.entries[0], "suite": "class", "file": "0.png"}])
    assert suite["cards"][0]["checks"] == []


def test_area_downsampling_is_the_mean_of_blocks_and_leaves_small_images_alone():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    means = image.reshape(4, 2, 4, 2, 3).mean((1, 3))
    assert np.abs(area_downsampled(image, 4) - means).max() <= 0.5
    assert area_downsampled(image, 8) is image
