"""Asked against read, and relations by their parts, held against scenes written by hand."""

from __future__ import annotations

import numpy as np
import pytest

from raphael.evaluate.scenes.breakdown import NOTHING, asked_and_read, ceiling, judged, relation_parts
from raphael.evaluate.scenes.reader import ReadObject, SceneReading, judge, read_scene


def thing(colour: str, shape: str, x: float, y: float = 0.5, area: float = 0.1) -> ReadObject:
    return ReadObject(shape, colour, (x, y), 0.4, area, "flat", 0.9)


def reading(*objects: ReadObject, background: str = "white", style: str | None = "flat", text: str | None = None):
    return SceneReading(background, objects, style, text)


def pair(kind: str = "left of", first=("red", "circle"), second=("blue", "square")) -> dict:
    objects = [{"colour": colour, "shape": shape} for colour, shape in (first, second)]
    relation = {"kind": kind, "subject": 0, "object": 1}
    return {"objects": objects, "relation": relation, "background": {"colour": "white"}, "style": "flat", "count": 2}


RIGHT = reading(thing("red", "circle", 0.25), thing("blue", "square", 0.75))
TURNED = reading(thing("red", "circle", 0.75), thing("blue", "square", 0.25))
CROSSED = reading(thing("blue", "circle", 0.25), thing("red", "square", 0.75))  # colours bound to the other object
ALONE = reading(thing("red", "circle", 0.5))
THREE = reading(thing("red", "circle", 0.2), thing("blue", "square", 0.8), thing("blue", "square", 0.5))


def test_a_relation_is_broken_down_into_its_parts():
    found = relation_parts([(pair(), seen) for seen in (RIGHT, TURNED, CROSSED, ALONE, THREE)])
    assert {name: found[name] for name in found if "_" in name and not name.endswith(("_n", "_low", "_high"))} == {
        "two_objects": 0.6,  # not ALONE, not THREE
        "both_shapes": 0.8,
        "both_colours": 0.8,
        "both_pairs": 0.6,  # not CROSSED, not ALONE
        "right_side": 0.4,  # RIGHT and THREE; of CROSSED the red one stands at the right
        "right_side_of_both_pairs": round(2 / 3, 6),  # of RIGHT, TURNED, THREE
    }
    assert found["right_side_of_both_pairs_n"] == 3 and found["two_objects_n"] == 5
    assert found["both_pairs_low"] < 0.6 < found["both_pairs_high"]


def test_two_of_one_colour_need_two_of_it():
    truth = pair(second=("red", "square"))
    found = relation_parts([(truth, RIGHT)])
    assert (found["both_colours"], found["both_shapes"]) == (0.0, 1.0)


def test_what_states_no_relation_is_no_part_of_it():
    truth = {**pair(), "relation": None}
    assert relation_parts([(truth, RIGHT)]) == {}


def test_the_tables_hold_every_attribute_that_was_asked_for_once():
    seen = [RIGHT, TURNED, CROSSED, ALONE, reading(background="black", style=None)]
    tables = asked_and_read([(pair(), item) for item in seen])
    assert tables["background_colour"] == {"white": {"white": 4, "black": 1}}
    assert tables["style"] == {"flat": {"flat": 4, NOTHING: 1}}
    assert tables["count"] == {"2": {"2": 3, "0": 1, "1": 1}}
    assert tables["relation"] == {"left of": {"not both": 2, "right of": 2, "left of": 1}}
    assert tables["shape"]["square"] == {"square": 3, NOTHING: 2} and "text" not in tables
    assert sum(tables["shape_colour"]["red"].values()) == 5


@pytest.mark.parametrize(("y", "kind"), [(0.2, "above"), (0.8, "below")])
def test_a_side_up_or_down_is_told_by_the_larger_distance(y, kind):
    seen = reading(thing("red", "circle", 0.55, y), thing("blue", "square", 0.5, 0.5))
    tables = asked_and_read([(pair(kind), seen)])
    assert tables["relation"] == {kind: {kind: 1}} and judge(seen, pair(kind))["relation"]


def test_a_word_is_held_against_a_word_and_only_entries_with_a_truth_of_the_suite_count():
    entries = [
        {"suite": "text", "truth": {"text": "CAT"}},
        {"suite": "text", "truth": None},
        {"suite": "single", "truth": {"text": "DOG"}},
    ]
    readings = [reading(text="KEY"), reading(), reading(text="DOG")]
    assert asked_and_read(judged(entries, readings))["text"] == {"CAT": {"KEY": 1}, "DOG": {"DOG": 1}}
    assert len(judged(entries, readings, "text")) == 1


def test_the_ceiling_of_drawn_scenes_is_nearly_all_and_lower_where_the_decoder_loses_something():
    from data_pipeline.source.scene_probe import probe_set

    scenes = probe_set(0, 15, 64, 0.12, ())
    grey = [np.full_like(image, 128) for image in scenes.images]
    drawn, decoded = ([read_scene(image) for image in images] for images in (scenes.images, grey))
    found = ceiling(scenes.entries(), drawn, decoded)
    assert found["drawn"]["picture_accuracy"] >= 0.9 and found["drawn"]["relation_parts"]["both_pairs"] >= 0.9
    assert found["decoded"]["shape_accuracy"] == 0.0 and found["decoded"]["shape_accuracy_n"] == 15
    assert found["decoded"]["relation_parts"]["two_objects"] == 0.0
