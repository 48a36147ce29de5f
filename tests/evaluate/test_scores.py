import numpy as np
import pytest

from raphael.base.stage import write_json
from raphael.evaluate.metrics.clip_score import clip_score, clip_score_of_others, nearest, retrieval
from raphael.evaluate.report.sections import funnel
from raphael.evaluate.scenes.attributes import score
from raphael.evaluate.scenes.reader import ReadObject, SceneReading


def unit(rng, n, dim=8):
    rows = rng.normal(size=(n, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_clip_score_agrees_with_a_loop_over_pairs():
    rng = np.random.default_rng(0)
    images, texts = unit(rng, 9), unit(rng, 9)
    own = np.mean([images[i] @ texts[i] for i in range(9)])
    others = np.mean([images[i] @ texts[j] for i in range(9) for j in range(9) if i != j])
    assert clip_score(images, texts) == pytest.approx(own, abs=1e-14)
    assert clip_score_of_others(images, texts) == pytest.approx(others, abs=1e-14)


def test_retrieval_agrees_with_a_loop_and_equal_prompts_are_one_choice():
    rng = np.random.default_rng(1)
    images, texts = unit(rng, 20, 3), unit(rng, 20, 3)
    hits = 0
    for start in (0, 10):
        for i in range(start, start + 10):
            hits += all(images[i] @ texts[j] < images[i] @ texts[i] for j in range(start, start + 10) if j != i)
    assert retrieval(images, texts, 10) == hits / 20
    same = np.repeat(unit(rng, 1), 4, axis=0)
    assert retrieval(same, same, 4) == 1.0


def test_the_nearest_of_others_is_the_largest_cosine():
    assert nearest(np.eye(3), np.eye(3)[:2]).tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("bad", [np.full((2, 3), np.nan), np.zeros((3, 3)), np.zeros((0, 3))])
def test_embeddings_that_do_not_fit_are_an_error(bad):
    with pytest.raises(ValueError, match="expected"):
        clip_score(bad, np.ones((2, 3)))


def test_a_perfect_painter_scores_one_and_chance_says_what_ignoring_prompts_gives():
    """Two backgrounds in turn: against the truth of another image half of them fit."""
    entries, readings = [], []
    for index in range(12):
        colour = ("red", "blue")[index % 2]
        truth = {"background": {"colour": colour}, "objects": [{"shape": "circle", "colour": "green"}]}
        entries.append({"suite": "single", "truth": truth})
        thing = ReadObject("circle", "green", (0.5, 0.5), 0.5, 0.2, "flat", 1.0)
        readings.append(SceneReading(colour, (thing,), "flat", None))
    result = score(entries, readings)
    assert result["background_colour_accuracy"] == result["shape_accuracy"] == 1.0
    assert result["chance"]["shape_accuracy"] == 1.0
    assert 0 < result["chance"]["background_colour_accuracy"] < 1
    assert result["relation_accuracy"] is None and result["relation_accuracy_n"] == 0
    assert result["by_suite"]["single"]["pictures"] == 12


def test_the_funnel_shows_where_rows_do_not_add_up(tmp_path):
    write_json(tmp_path / "source.json", {"total": 10, "kept": 10, "dropped": {}})
    write_json(tmp_path / "select.json", {"total": 10, "kept": 7, "dropped": {"short": 1, "no address": 2}})
    write_json(tmp_path / "filter.json", {"total": 6, "kept": 6, "dropped": {}})
    rows = funnel(tmp_path)
    assert [row["broken"] for row in rows] == [False, False, True]
    assert [item["count"] for item in rows[1]["dropped"]] == [2, 1]
