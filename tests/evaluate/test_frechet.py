import numpy as np
import pytest

from raphael.evaluate.frechet import Features, frechet_distance


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
