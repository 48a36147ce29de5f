"""A score's limit is known once: rule by rule, range by range and setting by setting it is the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.common.rules import hopeless, limits, needed, score_rules
from data_pipeline.common.schema import HEIGHT, SCORES, WIDTH
from raphael.base.config.params import load_config

CONFIG = replace(load_config().filter, missing_score="drop")


def kept(score: str, values: np.ndarray) -> np.ndarray:
    """By the rules that stages ask, one score varied, the others right in the middle of what is kept."""
    good = {limit.score: limit.value + (0.01 if limit.kind == "min" else -0.01) for limit in limits(CONFIG).values()}
    columns = {name: np.full(len(values), value) for name, value in good.items()}
    columns |= {WIDTH: np.full(len(values), 512.0), HEIGHT: np.full(len(values), 512.0), score: values}
    return ~np.any([marks(columns) for _, marks in score_rules(CONFIG)], axis=0)


@pytest.mark.parametrize("score", SCORES)
def test_a_limit_says_of_a_range_what_the_rules_say_of_every_value_in_it(score):
    limit = limits(CONFIG)[score]
    values = limit.value + np.linspace(-0.04, 0.04, 9)
    assert np.array_equal(kept(score, values), ~limit.drops(values)) and 0 < kept(score, values).sum() < 9
    for low in range(9):
        for high in range(low, 9):
            none_kept = not kept(score, values[low : high + 1]).any()
            assert limit.drops_all(values[low], values[high]) == none_kept
            assert hopeless(CONFIG, {score: (values[low], values[high])}.get) == none_kept


@pytest.mark.parametrize("score", SCORES)
def test_a_limit_names_the_setting_that_it_comes_from(score):
    section, _, name = limits(CONFIG)[score].setting.partition(".")
    assert section == "filter" and getattr(CONFIG, name) == limits(CONFIG)[score].value


def test_a_range_proves_nothing_where_a_score_may_be_missing_or_comes_later():
    bad = {limit.score: (limit.value - 9, limit.value - 8) for limit in limits(CONFIG).values() if limit.kind == "min"}
    assert hopeless(CONFIG, bad.get) and not hopeless(CONFIG, bad.get, tuple(bad))
    assert not hopeless(replace(CONFIG, missing_score="keep"), bad.get)
    assert needed(replace(CONFIG, missing_score="keep")) == ["unsafe"]
    assert not needed(replace(CONFIG, missing_score="keep", missing_unsafe="keep"))
    unsafe = {"unsafe": (0.9, 1.0)}
    assert hopeless(replace(CONFIG, missing_score="keep"), unsafe.get)
    assert not kept("aesthetic", np.array([np.nan])).any() and needed(CONFIG, ("aesthetic",)) == list(SCORES[:-1])
