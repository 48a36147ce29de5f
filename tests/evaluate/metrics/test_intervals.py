import math

import numpy as np
import pytest

from raphael.evaluate.metrics.intervals import bootstrap_mean, share, wilson


@pytest.mark.parametrize(("hits", "n"), [(1, 3), (90, 100), (7, 200), (199, 200)])
def test_both_ends_solve_the_equation_that_defines_the_interval(hits, n):
    z = 1.959963984540054
    for end in wilson(hits, n):
        assert (hits / n - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, rel=1e-9)


def test_no_hit_and_every_hit_have_the_closed_form():
    z2 = 1.959963984540054**2
    assert wilson(0, 50) == (0.0, pytest.approx(z2 / (50 + z2)))
    assert wilson(50, 50) == (pytest.approx(50 / (50 + z2)), 1.0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    n, truth = 200, 0.3
    covered = sum(
        math.comb(n, hits) * truth**hits * (1 - truth) ** (n - hits)
        for hits in range(n + 1)
        if wilson(hits, n)[0] <= truth <= wilson(hits, n)[1]
    )
    assert 0.94 < covered < 0.96


def test_nothing_measured_is_null_and_says_so_in_n():
    assert share("x", []) == {"x": None, "x_n": 0, "x_low": None, "x_high": None}


def test_more_hits_than_images_is_an_error():
    with pytest.raises(ValueError, match="3 hits of 2"):
        wilson(3, 2)


@pytest.mark.parametrize("kind", ["normal", "exponential"])
def test_the_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says(kind):
    rng, trials, n = np.random.default_rng(0), 400, 80
    covered = 0
    for trial in range(trials):
        values = getattr(rng, kind)(size=n)
        low, high = bootstrap_mean(values, resamples=400, seed=trial)
        covered += low <= (0.0 if kind == "normal" else 1.0) <= high
    assert 0.91 < covered / trials < 0.98  # 0.95 give or take 2.2 percentage points of chance, and of the resamples'


def test_images_of_one_prompt_count_together():
    """Every value four times over: an interval over images would be half as wide as the prompts allow."""
    rng, trials, groups = np.random.default_rng(1), 300, 60
    together = alone = 0
    for trial in range(trials):
        values = np.repeat(rng.normal(size=groups), 4)
        low, high = bootstrap_mean(values, np.repeat(np.arange(groups), 4), resamples=300, seed=trial)
        together += low <= 0 <= high
        low, high = bootstrap_mean(values, resamples=300, seed=trial)
        alone += low <= 0 <= high
    assert together / trials > 0.9 > 0.8 > alone / trials


def test_the_bootstrap_agrees_with_the_normal_interval_where_there_is_much():
    values = np.random.default_rng(2).normal(3.0, 2.0, size=4000)
    half = 1.96 * values.std(ddof=1) / math.sqrt(4000)
    low, high = bootstrap_mean(values)
    assert (low, high) == bootstrap_mean(values)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


@pytest.mark.parametrize(("values", "groups"), [([1.0], None), ([1.0, math.nan], None), ([1.0, 2.0], ["a", "a"])])
def test_too_little_for_an_interval_is_an_error(values, groups):
    with pytest.raises(ValueError, match="expected"):
        bootstrap_mean(values, groups)
