"""Scores by suite, failures worth looking at, which number judges, and what the report makes of them."""

import numpy as np
import pytest
from PIL import Image

from raphael.base.stage import write_json
from raphael.evaluate.findings import image_table, judgement_of, worth_looking_at
from raphael.evaluate.metrics.intervals import wilson
from raphael.evaluate.metrics.of_prompts import by_suite
from raphael.evaluate.report.findings import beside, clip_by_suite, failures, metric_cards
from raphael.evaluate.scenes.attributes import score, wrong_attributes
from raphael.evaluate.scenes.reader import SceneReading

ENTRIES = [
    {"file": f"{index}.png", "index": index, "prompt": f"prompt {index}", "suite": "one" if index < 4 else "two"}
    for index in range(6)
]
COSINES = np.array([0.3, 0.1, 0.5, 0.2, 0.9, 0.7])


def facts(**changes):
    settings = {"seed": 0, "sampler": "ddim", "steps": 9, "guidance_scale": 4.0, "batch_size": 50, "precision": "auto"}
    measured = {"total": 6, "model": "c0ffee" * 3, "settings": settings, "prompts": "5e7" * 9, "scorer": "5c0" * 9}
    return {**measured, "clip_score_self": 0.45, "clip_score_self_interval": [0.25, 0.65], **changes}


def test_every_suite_has_its_mean_and_an_interval_around_it():
    found = by_suite(ENTRIES, COSINES)
    assert found["one"]["value"] == pytest.approx(0.275) and found["two"]["value"] == pytest.approx(0.8)
    assert (found["one"]["pictures"], found["two"]["pictures"]) == (4, 2)
    assert found["one"]["low"] < 0.275 < found["one"]["high"]
    assert by_suite(ENTRIES[:1], COSINES[:1])["one"]["low"] is None, "one prompt has no spread"


def test_failures_are_the_lowest_scores_and_the_most_wrong_and_a_right_image_is_none():
    wrong = [["shape"], [], ["shape", "count"], [], ["count", "shape", "style"], ["style"]]
    found = worth_looking_at(ENTRIES, COSINES, wrong)
    assert [row["file"] for row in found["lowest_clip_score"]] == [f"{index}.png" for index in (1, 3, 0, 2, 5, 4)]
    assert found["lowest_clip_score"][0]["value"] == 0.1
    assert [row["file"] for row in found["most_wrong"]] == ["4.png", "2.png", "0.png", "5.png"]
    assert list(found["wrong"].items()) == [("shape", 3), ("count", 2), ("style", 2)]
    assert worth_looking_at(ENTRIES, None, None) == {"lowest_clip_score": [], "most_wrong": [], "wrong": {}, "best": []}


def test_the_best_have_nothing_wrong_the_suites_in_turn_the_higher_score_first():
    wrong = [[], ["shape"], [], [], [], []]
    best = [row["file"] for row in worth_looking_at(ENTRIES, COSINES, wrong)["best"]]
    assert best == ["2.png", "4.png", "0.png", "5.png", "3.png"]
    assert [row["file"] for row in worth_looking_at(ENTRIES, None, wrong)["best"]][:3] == ["0.png", "4.png", "2.png"]
    by_score = [row["file"] for row in worth_looking_at(ENTRIES, COSINES, None)["best"]]
    assert by_score == ["4.png", "5.png", "2.png", "0.png", "3.png", "1.png"]


def test_the_judging_number_is_the_exact_one_where_truth_is_known_and_its_protocol_is_what_was_asked_and_how():
    judged = judgement_of(facts())
    assert (judged.metric, judged.value, judged.low, judged.high) == ("clip_score_self", 0.45, 0.25, 0.65)
    low, high = wilson(5, 6)
    exact = judgement_of(facts(picture_accuracy=5 / 6, picture_accuracy_low=low, picture_accuracy_high=high))
    assert exact.metric == "picture_accuracy" and exact.protocol != judged.protocol
    same = judgement_of(facts(settings={**facts()["settings"], "batch_size": 7}, clip_score_self=0.5, model="other"))
    assert same.protocol == judged.protocol
    for changed in (
        {"prompts": "other"},
        {"scorer": "another CLIP"},
        {"settings": {**facts()["settings"], "guidance_scale": 5.0}},
        {"settings": {**facts()["settings"], "seed": 1}},
    ):
        assert judgement_of(facts(**changed)).protocol != judged.protocol, changed
    assert judgement_of({"settings": {}, "clip_score_self": None}) is None


def test_an_image_is_right_when_everything_that_its_prompt_states_is():
    truth = {
        "style": None,
        "background": {"colour": "black", "kind": "plain"},
        "objects": [{"shape": "star", "colour": "red", "size": None, "texture": None}],
        "relation": None,
        "count": 1,
        "text": None,
    }
    entries = [{"suite": "single", "truth": truth}] * 3
    from raphael.evaluate.scenes.reader import read_scene

    blank = read_scene(np.zeros((64, 64, 3), np.uint8))
    assert isinstance(blank, SceneReading)
    found = score(entries, [blank] * 3)
    assert found["background_colour_accuracy"] == 1.0 and found["picture_accuracy"] == 0.0
    assert found["picture_accuracy_n"] == 3 and found["by_suite"]["single"]["picture_accuracy"] == 0.0
    assert set(wrong_attributes(entries[0], blank)) >= {"shape", "shape_colour"}
    only_background = {**truth, "objects": [], "count": None}
    assert wrong_attributes({"truth": only_background}, blank) == []


def test_a_metrics_card_says_n_interval_and_protocol():
    measured = facts(fd_clip_self_6=0.1, fd_clip_self_6_reference="9 training pictures")
    measured["protocol"] = {"identity": "raphael/v1"}
    cards = {card["key"]: card for card in metric_cards(measured)}
    assert cards["clip_score_self"]["n"] == 6 and cards["clip_score_self"]["interval"] == ["0.25", "0.65"]
    line = "raphael/v1, prompts 5e75e75e, sampler ddim, steps 9, guidance 4.0, seed 0, model c0ffeec0, CLIP 5c05c05c"
    assert cards["clip_score_self"]["protocol"] == line
    assert cards["fd_clip_self_6"]["protocol"] == f"{line}, against 9 training pictures"


def test_the_report_shows_suites_failures_and_what_lies_beside_and_nothing_where_nothing_is(tmp_path):
    for entry in ENTRIES:
        Image.new("RGB", (8, 8), "red").save(tmp_path / entry["file"])
    measured = facts(clip_score_self_by_suite=by_suite(ENTRIES, COSINES))
    measured["failures"] = worth_looking_at(ENTRIES, COSINES, [["shape"]] + [[]] * 5)
    suites = clip_by_suite(measured)
    assert suites["key"] == "clip_score_self" and [row["name"] for row in suites["rows"]] == ["one", "two"]
    shown = failures(measured, tmp_path)
    assert shown["lowest"][0]["prompt"] == "prompt 1" and shown["lowest"][0]["uri"].startswith("data:image/png")
    assert [card["wrong"] for card in shown["most_wrong"]] == [["object shape"]]
    assert clip_by_suite(facts()) is None and failures(facts(), tmp_path) is None
    assert beside(tmp_path, "m") == {"sweep": None, "data_card": False}
    point = {"x": 4.0, "seeds": 1, "distance": {"mean": 1.0, "error": None}, "score": {"mean": 0.3, "error": None}}
    figure = {"n": 6, "n_reference": 9, "distance": "fd_6", "score": "clip_score", "series": {"": [point]}}
    kinds = ("alpha", "space_experts", "time_experts", "edge_max_timestep")
    figures = {"guidance": figure} | {name: {"absent": "no reason"} for name in kinds}
    write_json(tmp_path / "sweep.json", {"model": "m", "knobs": {"alpha": 0.2}, "figures": figures})
    assert [one["name"] for one in beside(tmp_path, "m")["sweep"]["figures"]] == ["guidance"]
    assert beside(tmp_path, "another model")["sweep"] is None


def test_the_table_of_images_spreads_over_all_prompts():
    entries = [{"prompt": str(index), "index": index} for index in range(100)]
    table = image_table(entries, [np.zeros((4, 4, 3), np.uint8)] * 100, seed=7)
    assert len(table["picture"]) == 32 and table["prompt"][:2] == ["0", "3"] and table["seed"][1] == "7/3"
    assert len(set(table["prompt"])) == 32
