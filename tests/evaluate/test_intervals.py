import math

import pytest

from raphael.evaluate.intervals import share, wilson


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


def test_more_hits_than_pictures_is_an_error():
    with pytest.raises(ValueError, match="3 hits of 2"):
        wilson(3, 2)
