import math

import numpy as np
import pytest
import torch

from raphael.base.randomness import SampleRng, permutation


def test_a_sample_draws_the_same_alone_as_in_any_batch():
    together = SampleRng(3, 2, np.arange(10)).normal("noise", (4, 5))
    for split in ([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], [[9], [3, 0]]):
        for indices in split:
            np.testing.assert_array_equal(SampleRng(3, 2, indices).normal("noise", (4, 5)), together[indices])


def test_what_was_drawn_before_changes_nothing():
    rng = SampleRng(0, 0, [1, 2])
    first = rng.uniform("timestep")
    rng.normal("noise", (7,))
    np.testing.assert_array_equal(rng.uniform("timestep"), first)


def test_a_longer_draw_begins_with_the_shorter_one():
    rng = SampleRng(0, 0, [1, 2])
    np.testing.assert_array_equal(rng.normal("noise", (8,))[:, :5], rng.normal("noise", (5,)))


@pytest.mark.parametrize(
    "other",
    [SampleRng(1, 0, [5]), SampleRng(0, 1, [5]), SampleRng(0, 0, [6]), SampleRng(0, 5, [0]), SampleRng(5, 0, [0])],
)
def test_seed_epoch_and_index_each_give_other_numbers(other):
    assert not np.isin(SampleRng(0, 0, [5]).normal("noise", (64,)), other.normal("noise", (64,))).any()


def test_streams_are_independent():
    rng = SampleRng(0, 0, np.arange(4000))
    a, b = rng.normal("a"), rng.normal("b")
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.06


def test_each_sample_may_have_its_own_epoch():
    mixed = SampleRng(0, [0, 1], [9, 0]).normal("noise", (3,))
    np.testing.assert_array_equal(mixed[0], SampleRng(0, 0, [9]).normal("noise", (3,))[0])
    np.testing.assert_array_equal(mixed[1], SampleRng(0, 1, [0]).normal("noise", (3,))[0])


def kolmogorov_distance(numbers, distribution):
    """sqrt(n) times the largest distance between empirical and true distribution; above 1.63 in 1 % of cases."""
    numbers = np.sort(np.asarray(numbers, np.float64).ravel())
    truth = np.array([distribution(x) for x in numbers])
    steps = np.arange(len(numbers) + 1) / len(numbers)
    return np.sqrt(len(numbers)) * max(abs(steps[1:] - truth).max(), abs(steps[:-1] - truth).max())


def test_numbers_have_the_promised_distribution():
    rng = SampleRng(0, 0, np.arange(2000))
    normal = rng.normal("noise", (5,))
    assert kolmogorov_distance(normal, lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2)))) < 1.63
    assert kolmogorov_distance(normal[:, 0], lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2)))) < 1.63  # across samples
    assert kolmogorov_distance(rng.uniform("timestep"), lambda x: x) < 1.63
    counts = np.bincount(rng.integers("expert", 6), minlength=6)
    assert len(counts) == 6 and ((counts - 2000 / 6) ** 2 / (2000 / 6)).sum() < 15.1  # chi-squared, 5 degrees, 1 %


def test_uniform_stays_below_one_and_integers_in_range():
    rng = SampleRng(0, 0, np.arange(500))
    drawn = rng.uniform("u", (100,))
    assert drawn.dtype == torch.float32 and drawn.min() >= 0 and drawn.max() < 1
    assert rng.integers("t", 1000, (100,)).max() == 999


def test_shapes_are_batch_first():
    rng = SampleRng(0, 0, [1, 2, 3])
    assert rng.normal("n", (4, 2)).shape == (3, 4, 2)
    assert rng.uniform("u").shape == (3,)
    assert SampleRng(0, 0, []).normal("n", (4,)).shape == (0, 4)


def test_an_epochs_order_is_a_permutation_of_its_own():
    orders = [permutation(0, epoch, 100) for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(100))
    assert not (orders[0] == orders[1]).all() and not (orders[1] == orders[2]).all()
    np.testing.assert_array_equal(permutation(0, 1, 100), orders[1])


def test_the_numbers_stay_the_same_in_every_release():
    # a checkpoint of today must go on tomorrow with the same noise
    assert permutation(0, 0, 8).tolist() == [3, 5, 4, 1, 0, 7, 2, 6]
    noise = SampleRng(0, 1, [2]).normal("noise", (3,))[0]
    assert noise.tolist() == [1.570334553718567, 1.4091100692749023, 0.4496208429336548]
