import numpy as np
import pytest

from raphael.evaluate.metrics.frechet import (
    BLOCK_ROWS,
    Features,
    Reference,
    block_of,
    blocks_of,
    covariance_factor,
    frechet_distance,
)


def random_covariance(rng, dim):
    factor = rng.normal(size=(dim, dim))
    return factor @ factor.T / dim


def naive(mu1, sigma1, mu2, sigma2):
    """The textbook formula with SciPy's matrix square root."""
    from scipy.linalg import sqrtm

    root = np.real(sqrtm(sigma1 @ sigma2))
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root))


def test_spherical_gaussians_have_the_closed_form():
    mu1, mu2 = np.zeros(5), np.arange(5.0)
    assert frechet_distance(mu1, 4 * np.eye(5), mu2, 9 * np.eye(5)) == pytest.approx(30 + 5 * (2 - 3) ** 2, abs=1e-12)


def test_commuting_covariances_have_the_closed_form():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    a, b = rng.uniform(0.1, 3, 7), rng.uniform(0.1, 3, 7)
    mu = rng.normal(size=7)
    expected = (mu**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    distance = frechet_distance(mu, basis * a @ basis.T, np.zeros(7), basis * b @ basis.T)
    assert distance == pytest.approx(expected, rel=1e-12)


def test_general_covariances_agree_with_the_matrix_square_root():
    rng = np.random.default_rng(1)
    arguments = rng.normal(size=20), random_covariance(rng, 20), rng.normal(size=20), random_covariance(rng, 20)
    assert frechet_distance(*arguments) == pytest.approx(naive(*arguments), rel=1e-9)


def test_the_distance_agrees_with_torch_fidelity_on_the_same_features():
    import torch
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    rng = np.random.default_rng(10)
    one, two = rng.normal(size=(300, 24)), rng.normal(size=(250, 24)) @ random_covariance(rng, 24) + 0.2
    statistics = [fid_features_to_statistics(torch.from_numpy(rows)) for rows in (one, two)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert Features(24).update(one).distance(Features(24).update(two)) == pytest.approx(theirs, rel=1e-9)


def test_streaming_in_pieces_equals_numpy_on_the_whole():
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(500, 12)) * 0.01 + 1000.0  # a mean that would swallow the digits of a naive sum of squares
    stream = Features(12, keep_rows=0)
    for piece in np.array_split(rows, [1, 17, 18, 300]):
        stream.update(piece)
    np.testing.assert_allclose(stream.mean, rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(stream.covariance, np.cov(rows.T), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("counts", [(200, 300), (10, 300), (300, 10), (10, 12)])
def test_few_and_many_samples_agree_with_the_matrix_square_root(counts):
    rng = np.random.default_rng(3)
    one, two = rng.normal(size=(counts[0], 30)), rng.normal(size=(counts[1], 30)) @ random_covariance(rng, 30) + 0.3
    truth = naive(one.mean(0), np.cov(one.T), two.mean(0), np.cov(two.T))
    distance = Features(30).update(one).distance(Features(30).update(two))
    assert distance == pytest.approx(truth, rel=1e-5)  # the matrix root is only good to 1e-6 on singular products


def test_fewer_samples_than_dimensions_are_exact_to_ten_digits():
    """Rows +-s e_k, k < m, in D > m dimensions: diagonal covariances of rank m, so the distance has a closed form."""
    m, dim = 6, 40
    scale1, scale2 = np.linspace(1, 2, m), np.linspace(3, 5, m)

    def rows(scale):
        corner = np.zeros((m, dim))
        corner[np.arange(m), np.arange(m)] = scale
        return np.concatenate([corner, -corner])

    root1, root2 = scale1 * np.sqrt(2 / (2 * m - 1)), scale2 * np.sqrt(2 / (2 * m - 1))
    distance = Features(dim).update(rows(scale1)).distance(Features(dim).update(rows(scale2)))
    assert distance == pytest.approx(((root1 - root2) ** 2).sum(), rel=1e-12)


def test_a_set_is_at_distance_zero_from_itself():
    rows = np.random.default_rng(4).normal(size=(15, 40))
    assert Features(40).update(rows).distance(Features(40).update(rows)) < 1e-10


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: Features(3).update(np.zeros((4, 2))), "got shape"),
        (lambda: Features(2).update(np.array([[0.0, np.nan]])), "NaN"),
        (lambda: Features(2).update(np.zeros((1, 2))).distance(Features(2).update(np.zeros((5, 2)))), "at least 2"),
        (lambda: Features(2).distance(Features(3)), "same feature network"),
        (lambda: frechet_distance(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)), "sigma1"),
        (lambda: frechet_distance(np.zeros(2), np.eye(2), np.full(2, np.inf), np.eye(2)), "mu2"),
        (lambda: frechet_distance(np.zeros(2), np.array([[1, 2], [0, 1]]), np.zeros(2), np.eye(2)), "symmetric"),
    ],
)
def test_what_cannot_be_compared_is_an_error_and_never_a_number(act, says):
    with pytest.raises(ValueError, match=says):
        act()


def test_the_number_of_workers_and_the_size_of_pieces_change_no_bit():
    rng = np.random.default_rng(5)
    rows = (rng.normal(size=(3 * BLOCK_ROWS + 217, 16)) @ random_covariance(rng, 16) + 30).astype(np.float32)
    other = Features(16).update(rng.normal(size=(400, 16)))
    whole = Features(16).update(rows)
    results = {whole.distance(other)}
    for piece in (1, 7, 50, 64, 999, 2500):
        pieces = Features(16)
        for start in range(0, len(rows) if piece > 1 else 1200, piece):
            pieces.update(rows[start : start + piece])
        if piece > 1:
            results.add(pieces.distance(other))
            assert np.array_equal(pieces.covariance, whole.covariance) and np.array_equal(pieces.mean, whole.mean)
    for workers in (1, 2, 3):
        blocks = [block for worker in range(workers) for block in blocks_of(rows, worker, workers)]
        merged = Features.from_blocks(16, sorted(blocks, key=lambda block: block.index))
        assert merged.count == len(rows)
        results.add(merged.distance(other))
    assert len(results) == 1, results


def test_asking_in_between_changes_nothing_after():
    rows = np.random.default_rng(6).normal(size=(2 * BLOCK_ROWS + 5, 4))
    asked = Features(4)
    for piece in np.array_split(rows, 9):
        asked.update(piece)
        assert asked.covariance.shape == (4, 4)
    assert np.array_equal(asked.covariance, Features(4).update(rows).covariance)


def test_a_block_that_is_missing_or_twice_there_is_an_error():
    rows = np.random.default_rng(7).normal(size=(2 * BLOCK_ROWS, 3))
    first, second = blocks_of(rows)
    with pytest.raises(ValueError, match="every block in order"):
        Features.from_blocks(3, [second])
    with pytest.raises(ValueError, match="every block in order"):
        Features.from_blocks(3, [first, first])
    with pytest.raises(ValueError, match="every block in order"):
        Features.from_blocks(3, [block_of(rows[:10], 0), second])


def test_a_reference_gives_the_same_number_again_and_factors_once(monkeypatch):
    import raphael.evaluate.metrics.frechet as module

    rng = np.random.default_rng(8)
    factored = []
    monkeypatch.setattr(module, "covariance_factor", lambda s: factored.append(1) or covariance_factor(s))
    reference = Reference.of(Features(9).update(rng.normal(size=(80, 9))))
    ours = Features(9).update(rng.normal(size=(70, 9)) + 0.1)
    assert (
        reference.distance_to(ours)
        == reference.distance_to(ours)
        == ours.distance(Features(9).update(np.random.default_rng(8).normal(size=(80, 9))))
    )
    assert len(factored) == 2  # one for the reference, one for its copy


def test_a_singular_covariance_has_the_closed_form_too():
    values1, values2 = np.array([4.0, 1.0, 0.0, 0.0]), np.array([9.0, 0.0, 2.0, 0.0])
    expected = ((np.sqrt(values1) - np.sqrt(values2)) ** 2).sum()
    assert frechet_distance(np.zeros(4), np.diag(values1), np.zeros(4), np.diag(values2)) == pytest.approx(
        expected, abs=1e-12
    )
    basis = np.linalg.qr(np.random.default_rng(9).normal(size=(4, 4)))[0]
    turned = frechet_distance(np.zeros(4), basis * values1 @ basis.T, np.zeros(4), basis * values2 @ basis.T)
    assert turned == pytest.approx(expected, abs=1e-6)  # a zero eigenvalue comes out as 1e-16, its root as 1e-8


@pytest.mark.parametrize("count", [3, 12, 25])
def test_fewer_samples_than_dimensions_against_many_agree_with_a_projection_to_their_span(count):
    """The trace term sees S2 only within the span of the rows: there both are small, regular matrices."""
    rng = np.random.default_rng(count)
    dim = 32
    few, many = rng.normal(size=(count, dim)), rng.normal(size=(500, dim)) @ random_covariance(rng, dim)
    values, basis = np.linalg.eigh(np.cov(few.T))
    basis, values = basis[:, -(count - 1) :], values[-(count - 1) :]
    inner = np.sqrt(values)[:, None] * (basis.T @ np.cov(many.T) @ basis) * np.sqrt(values)
    trace = np.sqrt(np.linalg.eigvalsh(inner)).sum()
    step = few.mean(0) - many.mean(0)
    truth = step @ step + np.trace(np.cov(few.T)) + np.trace(np.cov(many.T)) - 2 * trace
    few, many = Features(dim).update(few), Features(dim).update(many)
    assert few.distance(many) == pytest.approx(truth, abs=1e-10)
    assert many.distance(few) == pytest.approx(truth, abs=1e-10)
