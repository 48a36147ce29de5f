"""Fresh held-out scenes: one fact exchanged, and no scene or caption of the reporting prompts."""

from __future__ import annotations

import re

import numpy as np
import pytest

from data_pipeline.source import scene_probe
from data_pipeline.source.scene_captions import heldout_prompts
from data_pipeline.source.scenes import COLOURS, SHAPES, SUITES, WORDS, heldout_scene
from raphael.base.probe_set import FACTS, PROBE, read_probe_set
from raphael.base.stage import StageError
from raphael.evaluate.scenes.reader import judge, read_scene

N, SIDE, SHARE = 30, 64, 0.12
NAMES = {  # fact -> the words it is told by
    "shape": r"(circle|square|triangle|star|cross|heart)",
    "colour": f"({'|'.join(COLOURS)})",
    "background": f"({'|'.join(COLOURS)})",
    "style": r"(flat|outline|ink|pixel)",
    "count": r"(one|two|three)",
    "pair_shape": f"({'|'.join(SHAPES)})",
    "side": r"(left|right|directly above|above|below|under)",
    "binding": f"({'|'.join(COLOURS)})",
    "word": f"({'|'.join(WORDS)})",
}


@pytest.fixture(scope="module")
def reported():
    return {entry["prompt"] for entry in heldout_prompts(0, 60, SIDE, SHARE)}


@pytest.fixture(scope="module")
def probe(reported):
    return scene_probe.probe_set(0, N, SIDE, SHARE, reported)


def test_there_are_so_many_scenes_of_every_suite_and_every_fact_is_asked_of_them(probe):
    assert [probe.suites.count(suite) for suite in SUITES] == [N] * 4
    assert set(probe.facts) == set(FACTS) and all(len(fact.captions) == N for fact in probe.facts.values())
    for fact, suite in (("shape", "single"), ("binding", "relation"), ("count", "count"), ("word", "text")):
        assert {probe.suites[row] for row in probe.facts[fact].rows} == {suite}


@pytest.mark.parametrize("fact", FACTS)
def test_the_wrong_caption_is_wrong_in_one_fact_and_has_the_same_words_otherwise(fact, probe):
    for row, wrong in zip(probe.facts[fact].rows, probe.facts[fact].captions, strict=True):
        true = probe.captions[row]
        told = [re.findall(NAMES[fact], text, re.IGNORECASE) for text in (true, wrong)]
        differing = sum(a.lower() != b.lower() for a, b in zip(*told, strict=True))
        # a style and the names of its forms: "pixel art" against "an ink drawing"
        assert differing == (2 if fact == "binding" else 1), (true, wrong)
        if fact == "binding":
            assert sorted(told[0]) == sorted(told[1])
        if fact != "style":
            rest = [
                re.sub(NAMES[fact] + r"(es|s)?\b|\b(an?)\b", "", text, flags=re.IGNORECASE) for text in (true, wrong)
            ]
            rest = [re.sub(r"(circle|square|triangle|star|cross|heart)(es|s)?\b", "", text) for text in rest]
            assert rest[0] == rest[1], (true, wrong)


def test_true_captions_are_true_of_their_images(probe):
    right = [all(ok is not False for ok in judge(read_scene(image), truth).values())
             for image, truth in zip(probe.images, probe.truths, strict=True)]  # fmt: skip
    assert np.mean(right) >= 0.95  # the reader is right in 98 % of attributes


def test_no_caption_and_no_scene_is_one_of_the_reporting_prompts(probe, reported):
    choosing = heldout_prompts(0, 60, SIDE, SHARE, "choosing/", reported)
    texts = {entry["prompt"] for entry in choosing}
    assert len(choosing) == 240 and not texts & reported
    everything = scene_probe.probe_set(0, 5, SIDE, SHARE, reported | texts)
    assert not set(everything.captions) & (reported | texts) and not set(probe.captions) & reported
    streams = [[heldout_scene(0, suite, number, SIDE, SHARE, stream) for suite in SUITES for number in range(200)]
               for stream in ("", "choosing/", scene_probe.STREAM)]  # fmt: skip
    places = [{(scene.things[0].centre, scene.brush) for scene in scenes} for scenes in streams]
    assert not places[0] & places[1] and not places[0] & places[2] and not places[1] & places[2]


def test_the_file_is_read_as_it_was_written_and_equal_sets_give_equal_bytes(probe, tmp_path):
    probe.write(tmp_path / PROBE)
    first = (tmp_path / PROBE).read_bytes()
    read = read_probe_set(tmp_path / PROBE)
    np.testing.assert_array_equal(read.images, probe.images)
    assert (read.captions, read.suites, read.truths) == (probe.captions, probe.suites, probe.truths)
    for name, fact in probe.facts.items():
        assert read.facts[name].captions == fact.captions
        np.testing.assert_array_equal(read.facts[name].rows, fact.rows)
    read.write(tmp_path / PROBE)
    assert (tmp_path / PROBE).read_bytes() == first and [file.name for file in tmp_path.iterdir()] == [PROBE]


def test_a_file_that_is_none_or_broken_is_one_line_that_says_what_to_do(tmp_path):
    with pytest.raises(StageError, match="no such file.*run the stage source"):
        read_probe_set(tmp_path / PROBE)
    (tmp_path / PROBE).write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(StageError, match="not a probe set.*delete it"):
        read_probe_set(tmp_path / PROBE)
