"""The drawn corpus: held-out combinations, determinism, captions that say what is there."""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml

from data_pipeline.source import scene_captions, scene_drawing, scenes
from data_pipeline.source.scenes import (
    COLOURS,
    SHAPES,
    STYLES,
    SUITES,
    Scene,
    heldout_combinations,
    heldout_scene,
    scene_of_row,
)
from raphael.base.config.data import LayoutShares

SHARE = 0.12
SIDES = (64, 128)


def training(number: int, seed: int = 0) -> list[Scene]:
    return [scene_of_row(seed, row, SIDES, SHARE) for row in range(number)]


def test_layouts_come_by_their_shares_and_where_nothing_is_said_by_the_defaults():
    shares = dict(zip(scenes.LAYOUTS, (0.1, 0.4, 0.0, 0.3, 0.1, 0.1), strict=True))
    asked = [scene_of_row(0, row, SIDES, SHARE, shares) for row in range(4000)]
    for layout, share in shares.items():
        found = sum(scene.layout == layout for scene in asked) / len(asked)
        assert abs(found - share) <= 4 * (share * (1 - share) / len(asked)) ** 0.5, layout
    assert training(200) == [scene_of_row(0, row, SIDES, SHARE, scenes.LAYOUT_SHARES) for row in range(200)]
    assert vars(LayoutShares()) == scenes.LAYOUT_SHARES


def test_shares_that_are_no_whole_are_refused():
    with pytest.raises(ValueError, match="add up to 1.1, expected 1"):
        LayoutShares(single=0.8)


def test_the_first_phase_of_the_shipped_model_sees_captions_of_relations_and_no_others(project):
    (phase,) = yaml.safe_load((project / "params.scenes.yaml").read_text())["train"]["settings"]["phases"]
    shares = yaml.safe_load((project / "params.scenes.yaml").read_text())["source"]["scenes"]["shares"]
    for row in range(3000):
        scene = scene_of_row(0, row, (64, 64), SHARE, shares)
        text, _ = scene_captions.caption(scene, random.Random(row))
        assert bool(re.search(phase["captions"], text, re.IGNORECASE)) == (scene.layout == "relation"), text


def combinations(scene: Scene) -> set[tuple[str, str, str]]:
    return {(thing.shape, thing.colour, scene.background) for thing in scene.things}


@pytest.mark.parametrize("share", [0.1, 0.12, 0.5])
def test_at_least_the_stated_share_of_combinations_is_held_out(share):
    assert share <= len(heldout_combinations(3, share)) / len(scenes.all_combinations()) < share + 0.02


def test_no_training_scene_has_a_held_out_combination_but_every_single_value_appears():
    heldout, seen = heldout_combinations(0, SHARE), set()
    for scene in training(3000):
        assert not combinations(scene) & heldout
        seen |= combinations(scene)
    assert {shape for shape, _, _ in seen} == set(SHAPES)
    assert {colour for _, colour, _ in seen} == {background for _, _, background in seen} == set(COLOURS)
    assert len(seen) > 0.95 * (len(scenes.all_combinations()) - len(heldout))


@pytest.mark.parametrize("suite", SUITES)
def test_held_out_scenes_have_nothing_but_held_out_combinations(suite):
    heldout = heldout_combinations(0, SHARE)
    assert all(combinations(heldout_scene(0, suite, number, 64, SHARE)) <= heldout for number in range(100))


def test_a_scene_is_a_function_of_seed_and_row_and_another_process_draws_the_same_bytes():
    code = (
        "import hashlib; from data_pipeline.source import scene_drawing, scenes;"
        "print(hashlib.sha256(b''.join(scene_drawing.draw(scenes.scene_of_row(7, row, (64, 128), 0.12)).tobytes()"
        " for row in range(40))).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    images = {row: scene_drawing.draw(scene_of_row(7, row, SIDES, SHARE)).tobytes() for row in reversed(range(40))}
    assert there == hashlib.sha256(b"".join(images[row] for row in range(40))).hexdigest()
    assert scene_of_row(8, 0, SIDES, SHARE) != scene_of_row(7, 0, SIDES, SHARE)


def test_images_have_the_side_asked_for_and_objects_stay_inside_and_apart():
    for scene in training(400):
        image = np.asarray(scene_drawing.draw(scene))
        assert image.shape == (scene.side_px, scene.side_px, 3) and SIDES[0] <= scene.side_px <= SIDES[1]
        for thing in scene.things:
            assert all(
                0.02 <= centre - thing.extent / 2 and centre + thing.extent / 2 <= 0.98 for centre in thing.centre
            )
        for first, a in enumerate(scene.things):
            for b in scene.things[:first]:
                gap = max(abs(x - y) for x, y in zip(a.centre, b.centre, strict=True))
                assert gap > (a.extent + b.extent) / 2


def test_about_seven_in_ten_scenes_ask_for_one_object_and_all_styles_words_and_counts_occur():
    rows = training(3000)
    assert 0.66 < np.mean([scene.layout == "single" for scene in rows]) < 0.74
    assert {scene.style for scene in rows} == set(STYLES)
    assert {scene.word for scene in rows} - {None} == set(scenes.WORDS)
    assert {len(scene.things) for scene in rows} == {1, 2, 3}
    assert {scene.background_kind for scene in rows} == {"plain", "gradient"}


def test_a_caption_says_what_its_truth_states_and_nothing_that_is_not_there():
    for row, scene in enumerate(training(500)):
        text, truth = scene_captions.caption(scene, random.Random(row))
        words = text.lower().replace(",", " ").replace(".", " ").replace('"', " ").split()
        colours = {item["colour"] for item in truth["objects"]} | {truth["background"]["colour"]} - {None}
        assert {word for word in words if word in COLOURS} == colours
        shapes = {word for word in SHAPES if any(token in (word, word + "s", word + "es") for token in words)}
        assert shapes == {item["shape"] for item in truth["objects"]}
        assert {word for word in words if word in STYLES} == ({truth["style"]} - {None})
        assert {word for word in words if word in ("small", "large")} == (
            {item["size"] for item in truth["objects"]} - {None}
        )
        assert (truth["text"] is None) or truth["text"].lower() in words
        assert " a orange" not in text and " an red" not in text


def test_a_relation_told_from_the_other_side_is_the_same_fact():
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    told = set()
    for number in range(200):
        scene = heldout_scene(0, "relation", number, 64, SHARE)
        relation = scene_captions.caption(scene, random.Random(number), complete=True)[1]["relation"]
        kind = relation["kind"] if relation["subject"] == 0 else opposite[relation["kind"]]
        told.add(relation["subject"])
        first, second = scene.things
        axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[kind]
        assert kind == scene.relation and sign * (first.centre[axis] - second.centre[axis]) > 0.3
    assert told == {0, 1}


def test_held_out_prompts_are_distinct_complete_and_evenly_counted():
    prompts = scene_captions.heldout_prompts(0, 60, 64, SHARE)
    assert [sum(item["suite"] == suite for item in prompts) for suite in SUITES] == [60] * 4
    assert len({item["prompt"] for item in prompts}) == 240
    assert all(item["truth"]["style"] and item["truth"]["background"]["colour"] for item in prompts)
    counts = [item["truth"]["count"] for item in prompts if item["suite"] == "count"]
    assert [counts.count(number) for number in (1, 2, 3)] == [20, 20, 20]
    assert all(item["truth"]["text"] in item["prompt"] for item in prompts if item["suite"] == "text")
