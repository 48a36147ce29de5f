"""KID, CMMD, precision, recall, density, coverage against loops over pairs; three of them against torch-fidelity's."""

import math

import numpy as np
import pytest
import torch

from raphael.evaluate.metrics.kernels import cmmd, kid, polynomial_mmd
from raphael.evaluate.metrics.neighbours import density_coverage, precision_recall


@pytest.fixture
def sets():
    rng = np.random.default_rng(0)
    return rng.normal(size=(23, 6)) + 2.0, rng.normal(size=(31, 6)) * 1.3 + 2.2


def mean_over_pairs(kernel, a, b, without_self=False):
    values = [kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if not (without_self and i == j)]
    return math.fsum(values) / len(values)


def test_the_polynomial_mmd_agrees_with_a_loop_over_pairs(sets):
    def kernel(x, y):
        return (float(x @ y) / 6 + 1) ** 3

    x, y = sets
    naive = (
        mean_over_pairs(kernel, x, x, True) + mean_over_pairs(kernel, y, y, True) - 2 * mean_over_pairs(kernel, x, y)
    )
    assert polynomial_mmd(x, y) == pytest.approx(naive, rel=1e-11)


def test_kid_draws_the_subsets_of_torch_fidelity_and_agrees_with_it():
    from torch_fidelity.metric_kid import kid_features_to_metric

    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(120, 16)), rng.normal(size=(90, 16)) + 0.2
    options = {"kid_subsets": 7, "kid_subset_size": 40, "rng_seed": 2020, "verbose": False}
    options |= {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
    theirs = kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), kid_kernel="poly", **options)
    mean, std = kid(x, y, subsets=7, subset_size=40)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-8)


def test_precision_and_recall_agree_with_torch_fidelity():
    from torch_fidelity.metric_prc import prc_features_to_metric

    rng = np.random.default_rng(5)
    drawn, real = rng.normal(size=(150, 8)), 1.3 * rng.normal(size=(110, 8)) + 0.4
    options = {"prc_neighborhood": 3, "prc_batch_size": 64, "save_cpu_ram": False, "verbose": False}
    theirs = prc_features_to_metric(torch.from_numpy(drawn), torch.from_numpy(real), **options)
    ours = precision_recall(drawn, real)
    assert 0 < ours["precision"] < 1 and 0 < ours["recall"] < 1
    for name in ("precision", "recall"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6)  # theirs is a mean in float32


def test_kid_of_two_samples_of_one_distribution_is_zero_on_average():
    rng = np.random.default_rng(2)
    values = [polynomial_mmd(rng.normal(size=(40, 4)), rng.normal(size=(40, 4))) for _ in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(200)
    assert min(values) < 0 < max(values)


def test_cmmd_agrees_with_a_loop_over_pairs(sets):
    def kernel(x, y):
        return math.exp(-float((x - y) @ (x - y)) / 200)

    x, y = sets
    naive = mean_over_pairs(kernel, x, x) + mean_over_pairs(kernel, y, y) - 2 * mean_over_pairs(kernel, x, y)
    assert cmmd(x, y) == pytest.approx(1000 * naive, rel=1e-9)
    assert cmmd(x, x) == 0.0


def test_cmmd_of_two_points_each_has_the_closed_form():
    """Both sets one point twice: MMD^2 = 2 - 2 exp(-d^2 / 200)."""
    x, y = np.tile([0.0, 0.0], (2, 1)), np.tile([3.0, 4.0], (2, 1))
    assert cmmd(x, y) == pytest.approx(1000 * (2 - 2 * math.exp(-25 / 200)), rel=1e-12)


def radius(rows, i, k):
    return sorted(math.dist(rows[i], rows[j]) for j in range(len(rows)) if j != i)[k - 1]


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_agree_with_a_loop(sets, k):
    drawn, real = sets
    precise = [any(math.dist(x, real[j]) <= radius(real, j, k) for j in range(len(real))) for x in drawn]
    recalled = [any(math.dist(y, drawn[i]) <= radius(drawn, i, k) for i in range(len(drawn))) for y in real]
    found = precision_recall(drawn, real, k)
    assert found["precision"] == pytest.approx(sum(precise) / len(drawn), abs=1e-12)
    assert found["recall"] == pytest.approx(sum(recalled) / len(real), abs=1e-12)
    assert 0 < found["recall"] < 1


@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_agree_with_a_loop(sets, k):
    drawn, real = sets
    within = np.array([[math.dist(x, real[j]) <= radius(real, j, k) for j in range(len(real))] for x in drawn])
    found = density_coverage(drawn, real, k)
    assert found["density"] == pytest.approx(within.sum() / (k * len(drawn)), abs=1e-12)
    assert found["coverage"] == pytest.approx(within.any(0).mean(), abs=1e-12)


def test_the_number_of_rows_in_a_block_changes_nothing(sets, monkeypatch):
    import raphael.evaluate.metrics.kernels as kernels
    import raphael.evaluate.metrics.neighbours as neighbours

    drawn, real = sets
    before = precision_recall(drawn, real), density_coverage(drawn, real), cmmd(drawn, real)
    monkeypatch.setattr(kernels, "BLOCK_ROWS", 4)
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 5)
    assert (precision_recall(drawn, real), density_coverage(drawn, real)) == before[:2]
    assert cmmd(drawn, real) == pytest.approx(before[2], rel=1e-12)


def test_a_set_against_itself_is_precise_and_covers_everything(sets):
    real = sets[1]
    assert precision_recall(real, real) == {"precision": 1.0, "recall": 1.0}
    assert density_coverage(real, real)["coverage"] == 1.0
    far = real + 100
    assert precision_recall(far, real) == {"precision": 0.0, "recall": 0.0}
    assert density_coverage(far, real) == {"density": 0.0, "coverage": 0.0}


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: kid(np.zeros((5, 2)), np.zeros((9, 2)), subset_size=6), "expected at least 1 of 2 to 5"),
        (lambda: cmmd(np.full((3, 2), np.nan), np.zeros((3, 2))), "NaN"),
        (lambda: cmmd(np.zeros((3, 2)), np.zeros((3, 4))), "expected"),
        (lambda: cmmd(np.zeros((1, 2)), np.zeros((3, 2))), "at least 2"),
        (lambda: precision_recall(np.zeros((3, 2)), np.zeros((9, 2))), "k = 3"),
    ],
)
def test_what_cannot_be_measured_is_an_error(act, says):
    with pytest.raises(ValueError, match=says):
        act()
