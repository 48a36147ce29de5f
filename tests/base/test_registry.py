"""When the alias `best` moves, and what a logged model gathers."""

import json
from pathlib import Path

import numpy as np
import pytest

from raphael.base.config.params import load_config
from raphael.base.tracking import tracker as tracking
from raphael.base.tracking.registry import (
    Judgement,
    difference_low,
    is_better,
    logged_model,
    promote,
    protocol_sha256,
    register_model,
)
from raphael.evaluate.metrics.intervals import wilson


def share(hits, n, protocol="p", metric="picture_accuracy"):
    return Judgement(protocol, metric, hits / n, *wilson(hits, n))


def test_the_interval_of_a_difference_is_newcombes():
    """Newcombe 1998, table II, method 10: 56/70 - 48/80 from 0.0524 to 0.3339, 9/10 - 3/10 from 0.1705 to 0.8090."""
    assert difference_low(share(56, 70), share(48, 80)) == pytest.approx(0.0524, abs=5e-5)
    assert difference_low(share(9, 10), share(3, 10)) == pytest.approx(0.1705, abs=5e-5)


@pytest.mark.parametrize(
    ("new", "old", "moves"),
    [
        (share(600, 800), share(480, 800), True),
        (share(500, 800), share(480, 800), False),  # better, but within the interval
        (share(400, 800), share(480, 800), False),
        (share(480, 800), share(480, 800), False),
        (share(600, 800, protocol="q"), share(480, 800), False),
        (share(600, 800, metric="other"), share(480, 800), False),
    ],
)
def test_best_moves_for_a_gain_beyond_the_interval_by_the_same_protocol_only(new, old, moves):
    assert is_better(new, old) is moves


def test_chance_alone_moves_the_alias_in_one_trial_of_forty_at_most():
    rng = np.random.default_rng(0)
    pairs = rng.binomial(200, 0.6, (4000, 2))
    moved = np.mean([is_better(share(int(a), 200), share(int(b), 200)) for a, b in pairs])
    assert 0.015 < moved < 0.032  # one side of 95 %: 2.5 %


def test_a_judgement_outside_of_its_interval_is_an_error_and_protocols_have_names():
    with pytest.raises(ValueError, match="got 0.5 outside of its interval 0.6 to 0.7"):
        Judgement("p", "m", 0.5, 0.6, 0.7)
    assert protocol_sha256(a=1, b="x") == protocol_sha256(b="x", a=1) != protocol_sha256(a=2, b="x")


@pytest.fixture(scope="module")
def trained(project, tmp_path_factory):
    """A tracker in a run of its own, its model registered; the data base is made once."""
    root, config = tmp_path_factory.mktemp("registry"), load_config(project / "params.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        uri = tracking.resolve_uri(config, root)

        def train(sha256):
            run_id = tracking.create_run(config, root, sha256[:4])
            tracker = tracking.MlflowTracker(uri, run_id, tracking.journal_of(root, run_id))
            register_model(tracker, "raphael", root / "models", sha256, {"images_seen": 1})
            return tracker

        yield train


def test_the_alias_is_given_to_the_first_and_moves_on_evidence(trained):
    first, second, third = (name * 64 for name in "abc")
    tracker = trained(first)
    client = tracking.connect(tracker.uri)

    def best():
        return client.get_model_version_by_alias("raphael", "best").tags["sha256"]

    assert promote(tracker, "raphael", "f" * 64, share(1, 2)) is None  # not registered
    assert promote(tracker, "raphael", first, share(480, 800)).startswith("best is version 1")
    tracker = trained(second)
    assert promote(tracker, "raphael", second, share(500, 800)).endswith("0.625 against 0.6 is within the intervals")
    assert promote(tracker, "raphael", second, share(700, 800, "q")).endswith("measured by another protocol")
    assert best() == first
    assert promote(trained(third), "raphael", third, share(600, 800)) == "best is version 3: picture_accuracy 0.75"
    assert best() == third
    assert promote(tracking.NullTracker(), "raphael", third, share(1, 2)) is None


def test_an_evaluated_checkpoint_is_one_logged_model_with_its_numbers(trained, tmp_path):
    tracker = trained("d" * 64)
    ids = {logged_model(tracker, "raphael", tmp_path, "d" * 64, {}) for _ in range(2)}
    assert len(ids) == 1, "the one that training registered"
    (model_id,) = ids
    tracker.log({"evaluate/picture_accuracy": 0.5}, step=7, model_id=model_id)
    client = tracking.connect(tracker.uri)
    (metric,) = client.get_logged_model(model_id).metrics
    assert (metric.key, metric.value, metric.run_id) == ("evaluate/picture_accuracy", 0.5, tracker.run_id)
    assert client.get_run(tracker.run_id).data.metrics["evaluate/picture_accuracy"] == 0.5
    other = trained("e" * 64)
    better = logged_model(other, "raphael", tmp_path, "e" * 64, {})
    other.log({"evaluate/picture_accuracy": 0.75}, step=7, model_id=better)
    order = [{"field_name": "metrics.`evaluate/picture_accuracy`", "ascending": False}]
    experiment = client.get_run(tracker.run_id).info.experiment_id
    board = client.search_logged_models([experiment], order_by=order)
    assert [model.model_id for model in board][:2] == [better, model_id]
    assert logged_model(tracking.NullTracker(), "raphael", tmp_path, "d" * 64, {}) is None


def test_a_table_of_images_is_logged_once(trained):
    from PIL import Image

    tracker = trained("9" * 64)
    for _ in range(2):
        pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        tracker.table("evaluate_pictures", {"prompt": ["a", "b"], "seed": [0, 0], "picture": pictures})
    client = tracking.connect(tracker.uri)
    table = json.loads(Path(client.download_artifacts(tracker.run_id, "evaluate_pictures.json")).read_text())
    assert table["columns"] == ["prompt", "seed", "picture"] and [row[0] for row in table["data"]] == ["a", "b"]
    shown = Image.open(client.download_artifacts(tracker.run_id, table["data"][1][2]["filepath"]))
    assert shown.getpixel((0, 0)) == (0, 0, 255)
