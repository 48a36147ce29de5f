"""The registry of metrics: what every one of them keeps to, whoever adds it."""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from truth.known_cascade import known_cascade
from truth.tiny_raphael import ROOT, write_pipeline

from raphael.base.config.params import load_config
from raphael.base.stage import Stage
from raphael.base.strict import ConfigError, load, read_yaml
from raphael.evaluate.catalogue import METRICS, NAMES, metric_named, metric_of, metrics_named
from raphael.evaluate.metric import Found, Metric, Number, measure
from raphael.evaluate.protocols.protocol import SYSTEMS, Protocol, load_protocol, protocol_names, system_protocol
from raphael.evaluate.protocols.workspace import Workspace
from raphael.evaluate.subject import ABSENT, NEEDS, TRUTH, Pair, Rows, Rules, Subject

METRIC = pytest.mark.parametrize("metric", METRICS, ids=NAMES)


class Everything(Workspace):
    """Nine drawn scenes with labels, an untrained pipeline, a head: whatever a metric can ask for."""

    def __init__(self, root, config, probe):
        shown = [row for row, suite in enumerate(probe.suites) if suite == "single"]
        shown += [row for row, suite in enumerate(probe.suites) if suite == "relation"]
        entries = [probe.entries()[row] for row in shown]
        for entry in entries:
            entry["label"] = entry["truth"]["objects"][0]["shape"]
        protocol = system_protocol("raphael")
        super().__init__(config, Stage("evaluate", root), protocol, entries, [], root / "models/raphael")
        self._images, self.drawn = [probe.images[row] for row in shown], root / "probe.npz"
        self.compared = list(probe.images[::-1])

    @functools.cached_property
    def pairs(self):
        network = self.networks[0]
        rows = [Rows(network.rows(side)) for side in (self._images, self.compared)]
        return [Pair(network, *rows, reference="drawn scenes")]


class ImagesAlone(Subject):
    def images(self):
        return iter(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    from data_pipeline.source.scene_probe import probe_set

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("workspace")
    write_pipeline(root / "models/raphael")
    probe = probe_set(0, 5, 32, 0.12, ())
    probe.write(root / "probe.npz")
    torch.manual_seed(1)
    torch.save({"weight": torch.randn(1, 16), "bias": torch.zeros(1)}, root / "head.pth")
    config = load_config(ROOT / "params.yaml")
    told = replace(config.evaluate, num_probe=1, num_knockout_images=2, num_swaps=2)
    told = replace(told, aesthetic_head=str(root / "head.pth"))
    return lambda: Everything(root, replace(config, evaluate=told, device="cpu"), probe)


@pytest.fixture(scope="module")
def measured(everything):
    """metric -> what it finds on a subject that has everything, each time a fresh one; the first is kept."""

    @functools.cache
    def found(metric: Metric, again: bool) -> Found:
        subject = everything()
        if metric.name == "upsampler":  # of another system's model
            subject.__dict__["pipeline"] = known_cascade(side=32)
        return measure([metric], subject)

    return found


@METRIC
def test_a_metric_of_a_subject_that_has_everything_gives_the_same_finite_numbers_again(metric, measured):
    first, second = (measured(metric, again) for again in (False, True))
    assert json.dumps(first.flat()) == json.dumps(second.flat())
    assert not first.absent and (first.numbers or first.facts)
    for number in first.numbers:
        assert number.value is None or math.isfinite(number.value)
        if number.low is not None:
            assert number.low <= number.value <= number.high


@METRIC
def test_the_numbers_of_a_metric_are_known_to_be_its_and_no_others(metric, measured):
    names = [number.name for number in measured(metric, False).numbers]
    for name in names:
        matching = [one.name for one in METRICS if one.keys and re.fullmatch(one.keys, name)]
        beside = name.endswith("_of_other_prompts")  # it judges the number beside it, no model
        assert matching == ([] if beside else [metric.name]), name
    assert bool(metric.keys) == bool(names), "a metric that gives numbers names them"


@METRIC
def test_a_metric_whose_needs_are_not_there_is_absent_and_says_what_makes_them(metric):
    found = measure([metric], ImagesAlone(Rules(), [], None))
    if not metric.needs:
        assert not found.absent and (found.numbers or found.facts), "images are always there"
        return
    assert not found.numbers and found.absent == {metric.name: "; ".join(ABSENT[need] for need in metric.needs)}
    for need in metric.needs:
        assert any(word in ABSENT[need] for word in ("stage", "give --", "params.yaml", "evaluate.", "images.json"))


def test_every_need_says_what_makes_it():
    assert set(ABSENT) == set(NEEDS)
    with pytest.raises(ValueError, match="needs 'weather', expected some of prompts"):
        Metric("m", None, ("weather",), lambda subject: Found(), "")


def test_names_are_unique_and_an_unknown_one_is_answered_with_the_nearest():
    assert len(set(NAMES)) == len(NAMES)
    with pytest.raises(ConfigError, match="got 'frechet_distance', did you mean frechet"):
        metric_named("frechet_distance")
    with pytest.raises(ConfigError, match="evaluate.metrics: got 'zzz', expected one of aesthetic, "):
        metric_named("zzz", "evaluate.metrics")
    with pytest.raises(ConfigError, match="got 'scene-heldout/v1', did you mean scenes-heldout/v1"):
        load_protocol("scene-heldout/v1")
    with pytest.raises(ConfigError, match="system: got 'raphaell' without an evaluate.yaml, did you mean raphael"):
        system_protocol("raphaell")


def test_metrics_are_measured_in_the_order_of_the_registry_each_once():
    assert [metric.name for metric in metrics_named(["swap", "frechet", "scenes", "frechet"])] == [
        "scenes",
        "frechet",
        "swap",
    ]


def test_a_protocol_with_a_metric_that_is_none_says_which_file_and_the_nearest_name():
    said = read_yaml(SYSTEMS / "raphael/evaluate.yaml")
    with pytest.raises(ConfigError, match="x.yaml: Protocol: metrics: got 'clip_scor', did you mean clip_score"):
        load(Protocol, {**said, "metrics": ["clip_scor"]}, "x.yaml")


def test_metrics_beside_a_protocols_own_are_added_once_and_need_what_it_has():
    protocol = load_protocol("drawbench/v1")
    more = protocol.with_metrics(["aesthetic", "clip_score"], "--metric")
    assert more.metrics == ("clip_score", "aesthetic") and more.identity == protocol.identity
    with pytest.raises(ConfigError, match="--metric: frechet needs reference images, and drawbench/v1 has none"):
        protocol.with_metrics(["frechet"], "--metric")


def test_every_protocol_that_ships_names_metrics_of_the_registry():
    protocols = [load_protocol(name) for name in protocol_names()]
    protocols += [system_protocol(file.parent.name) for file in SYSTEMS.glob("*/evaluate.yaml")]
    assert all(set(protocol.metrics) <= set(NAMES) for protocol in protocols)


@pytest.mark.parametrize(
    ("key", "name", "better"),
    [
        ("fid_30000", "frechet", "lower"),
        ("fd_clip_self_200", "frechet", "lower"),
        ("fd_random64_300", "frechet", "lower"),
        ("clip_score_self", "clip_score", "higher"),
        ("precision_random64", "precision_recall", "higher"),
        ("picture_accuracy", "scenes", "higher"),
        ("class_accuracy", "class_accuracy", "higher"),
        ("class_accuracy_ceiling", "class_ceiling", None),
        ("nearest_training_picture_cosine", "nearest_reference", None),
    ],
)
def test_a_numbers_name_tells_its_metric_and_which_way_is_better(key, name, better):
    assert (metric_of(key).name, metric_of(key).better) == (name, better)


@pytest.mark.parametrize("key", ["fid_12_reference", "clip_score_self_of_other_prompts", "total", "shape_accuracy_n"])
def test_what_is_no_number_of_a_metric_belongs_to_none(key):
    assert metric_of(key) is None


def test_a_number_becomes_the_keys_that_its_kind_has():
    mean = Number("clip_score", 0.12345678, "net", 0.1, 0.2)
    assert mean.flat() == {"clip_score": 0.123457, "clip_score_interval": [0.1, 0.2]}
    share = Number("class_accuracy", 0.5, "reader", 0.25, 0.75, asked=4, chance=0.16666666)
    found = Found([mean, share])
    assert found.flat()["chance"] == {"class_accuracy": 0.166667}
    assert {key: found.flat()[f"class_accuracy{key}"] for key in ("", "_n", "_low", "_high")} == {
        "": 0.5,
        "_n": 4,
        "_low": 0.25,
        "_high": 0.75,
    }
    with pytest.raises(ValueError, match="kid: got nan"):
        Number("kid", math.nan)


def test_readings_are_taken_once_however_many_metrics_ask(monkeypatch):
    from raphael.evaluate.scenes import reader

    class Counted(Subject):
        def images(self):
            return iter([np.zeros((64, 64, 3), np.uint8)])

    read, real = [], reader.read_scene
    monkeypatch.setattr(reader, "read_scene", lambda image: (read.append(1), real(image))[1])
    truth = {"background": {"colour": "black"}, "objects": []}
    subject = Counted(Rules(), [{"prompt": "", "suite": "single", "truth": truth}], [""])
    assert subject.has(TRUTH)
    measure(metrics_named(["scenes", "asked_and_read", "relation_parts"]), subject)
    assert len(read) == 1
