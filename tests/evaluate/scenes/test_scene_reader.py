"""The reader of drawn scenes against the renderer, which it shares no code with."""

from __future__ import annotations

import ast
import inspect

import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipeline.source import scene_drawing, scenes
from raphael.evaluate.scenes import colours as scene_colours
from raphael.evaluate.scenes import reader as scene_reader
from raphael.evaluate.scenes.reader import ATTRIBUTES, SceneReading, judge, read_scene

NUMBER = 400
SUITE_OF = {"relation": "relation", "count": "count", "text": "text"}  # the others are judged on single objects


def picture_of(scene: scenes.Scene, side_px: int = 64) -> np.ndarray:
    """What the encoder sees: scaled to cover, cropped to the middle (square images: scaled)."""
    picture = scene_drawing.draw(scene)
    return np.asarray(picture.resize((side_px, side_px), Image.Resampling.LANCZOS))


def drawn(suite: str, number: int) -> list[tuple[np.ndarray, dict]]:
    out = []
    for index in range(number):
        scene = scenes.at_side(scenes.heldout_scene(11, suite, index, 64, 0.3), (64, 80, 96, 112, 128)[index % 5])
        out.append((picture_of(scene), scene.truth()))
    return out


def share_right(readings: list[SceneReading], truths: list[dict], attribute: str) -> float:
    verdicts = [judge(reading, truth)[attribute] for reading, truth in zip(readings, truths, strict=True)]
    asked = [verdict for verdict in verdicts if verdict is not None]
    assert len(asked) == len(verdicts)
    return float(np.mean(asked))


@pytest.fixture(scope="module")
def read() -> dict[str, tuple[list[SceneReading], list[dict]]]:
    out = {}
    for suite in scenes.SUITES:
        pictures = drawn(suite, NUMBER)
        out[suite] = [read_scene(picture) for picture, _ in pictures], [truth for _, truth in pictures]
    return out


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_at_least_98_percent_of_rendered_scenes_are_read_right(read, attribute):
    assert share_right(*read[SUITE_OF.get(attribute, "single")], attribute) >= 0.98


@pytest.mark.parametrize("suite", scenes.SUITES)
def test_colours_shapes_and_styles_are_read_right_in_every_suite(read, suite):
    for attribute in ("background_colour", "shape_colour", "shape", "style", "count"):
        assert share_right(*read[suite], attribute) >= 0.98, attribute


@pytest.mark.parametrize("attribute, chance", [
    ("background_colour", 0.2), ("shape_colour", 0.2), ("shape", 0.25), ("relation", 0.25), ("count", 0.45),
    ("text", 0.2),
    ("style", 0.4),
])  # fmt: skip
def test_a_wrong_image_is_called_wrong(read, attribute, chance):
    readings, truths = read[SUITE_OF.get(attribute, "single")]
    assert share_right(readings, truths[7:] + truths[:7], attribute) <= chance


def test_a_scene_without_a_word_has_none_and_the_word_is_no_object(read):
    assert not any(reading.text for suite in ("single", "relation", "count") for reading in read[suite][0])
    assert np.mean([reading.count == 1 for reading in read["text"][0]]) >= 0.98


@pytest.mark.parametrize("suite", scenes.SUITES)
def test_blur_and_noise_like_a_decoders_cost_little(suite):
    rng = np.random.default_rng(0)
    readings, truths = [], []
    for picture, truth in drawn(suite, 80):
        soft = cv2.GaussianBlur(picture, (0, 0), 0.7) + rng.normal(0, 6, picture.shape)
        readings.append(read_scene(np.clip(soft, 0, 255).round().astype(np.uint8)))
        truths.append(truth)
    for attribute in (
        "background_colour",
        "shape_colour",
        "shape",
        "style",
        "count",
        *({suite} & {"relation", "text"}),
    ):
        assert share_right(readings, truths, attribute) >= 0.93, attribute


def test_a_larger_or_wider_image_is_read_like_the_small_one():
    for index in range(30):
        scene = scenes.heldout_scene(2, "single", index, 64, 0.3)
        large = picture_of(scene, 256)
        wide = np.concatenate([large[:, :1].repeat(40, 1), large, large[:, -1:].repeat(40, 1)], axis=1)
        verdict = judge(read_scene(wide), scene.truth())
        assert verdict["background_colour"] and verdict["shape_colour"] and verdict["shape"]


def test_plain_noise_and_black_images_are_read_without_an_object_or_an_error():
    assert read_scene(np.zeros((64, 64, 3), np.uint8)).objects == ()
    assert read_scene(np.zeros((64, 64, 3), np.uint8)).background_colour == "black"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert judge(read_scene(noise), scenes.heldout_scene(0, "single", 0, 64, 0.12).truth())["shape"] is False


@pytest.mark.parametrize(
    "image", [np.zeros((64, 64, 3), np.float32), np.zeros((64, 64), np.uint8), np.zeros((8, 8, 3), np.uint8)]
)
def test_another_kind_of_array_is_refused_in_one_line(image):
    with pytest.raises(ValueError, match=r"image: got .*, expected uint8 \(H, W, 3\)"):
        read_scene(image)


def test_what_a_truth_does_not_ask_is_not_judged():
    reading = read_scene(picture_of(scenes.heldout_scene(0, "single", 0, 64, 0.12)))
    nothing = {
        "style": None,
        "background": {"colour": None, "kind": None},
        "objects": [],
        "relation": None,
        "count": None,
        "text": None,
    }
    assert judge(reading, nothing) == dict.fromkeys(ATTRIBUTES)


def test_colours_that_are_swapped_between_two_objects_are_no_match(read):
    for reading, truth in zip(*read["relation"], strict=True):
        first, second = truth["objects"]
        swapped = truth | {"objects": [first | {"colour": second["colour"]}, second | {"colour": first["colour"]}]}
        verdict = judge(reading, swapped)
        assert not (verdict["shape"] and verdict["shape_colour"])


def test_the_reader_imports_nothing_of_the_renderer():
    names = set()
    for module in (scene_reader, scene_colours):
        tree = ast.parse(inspect.getsource(module))
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names.remove("raphael.evaluate.scenes.colours")
    assert names <= {"__future__", "functools", "itertools", "math", "dataclasses", "typing", "numpy", "cv2"}
