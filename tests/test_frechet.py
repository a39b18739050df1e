"""The Fréchet distance against the textbook's formula, and its Gaussians against NumPy's."""

from __future__ import annotations

from src.metrics.frechet import Gaussian, frechet_distance

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**31)


def covariance(rng: np.random.Generator, size: int, rank: int) -> np.ndarray:
    factor = rng.normal(0, rng.uniform(0.1, 3), (size, rank))
    return factor @ factor.T


def textbook(mean_1, covariance_1, mean_2, covariance_2) -> float:
    """By the root of the product of both matrices."""
    root = scipy.linalg.sqrtm(covariance_1 @ covariance_2)
    parts = np.trace(covariance_1) + np.trace(covariance_2) - 2 * np.trace(root).real
    return float(np.sum((mean_1 - mean_2) ** 2) + parts)


@given(SEEDS, SIZES)
def test_full_rank_agrees_with_the_matrix_root(seed, size):
    rng = np.random.default_rng(seed)
    one, two = (covariance(rng, size, size + 3) for _ in range(2))
    means = rng.normal(0, 2, (2, size))
    wanted = textbook(means[0], one, means[1], two)
    got = frechet_distance(means[0], one, means[1], two)
    assert got == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@given(SEEDS, st.integers(2, 12), st.data())
def test_lacking_rank_agrees_with_full_rank_in_its_subspace(seed, size, data):
    """In the coordinates of a common subspace the covariances have full rank, and a root."""
    rng = np.random.default_rng(seed)
    rank = data.draw(st.integers(1, size - 1))
    basis = np.linalg.qr(rng.normal(size=(size, rank)))[0]
    one, two = (covariance(rng, rank, rank + 3) for _ in range(2))
    zero = np.zeros(rank)
    wanted = textbook(zero, one, zero, two)
    lifted = [basis @ c @ basis.T for c in (one, two)]
    got = frechet_distance(np.zeros(size), lifted[0], np.zeros(size), lifted[1])
    assert got == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@given(SEEDS, st.integers(2, 12), st.data())
def test_different_subspaces_agree_with_the_roots_of_the_eigenvalues(seed, size, data):
    rng = np.random.default_rng(seed)
    one, two = (covariance(rng, size, data.draw(st.integers(1, size))) for _ in range(2))
    shared = np.sqrt(np.maximum(np.linalg.eigvals(one @ two).real, 0)).sum()
    traces = np.trace(one) + np.trace(two)
    got = frechet_distance(np.zeros(size), one, np.zeros(size), two)
    # Half of the digits: eigenvalues that should be 0 are rounding errors, and roots enlarge them.
    assert got == pytest.approx(traces - 2 * shared, abs=1e-5 * (1 + traces))


@given(SEEDS, SIZES)
def test_a_set_has_no_distance_to_itself_and_a_shift_its_square(seed, size):
    rng = np.random.default_rng(seed)
    one = covariance(rng, size, max(1, size - 2))
    shift = rng.normal(0, 2, size)
    assert abs(frechet_distance(shift, one, shift, one)) < 1e-9 * (1 + np.trace(one))
    moved = frechet_distance(shift, one, np.zeros(size), one)
    assert moved == pytest.approx(np.sum(shift**2), rel=1e-9, abs=1e-9)


@given(SEEDS, st.lists(st.integers(1, 40), min_size=1, max_size=6), SIZES)
def test_parts_give_what_all_features_at_once_give(seed, counts, size):
    """Also far from 0, where sums of squares would lose their digits."""
    rng = np.random.default_rng(seed)
    features = 1e6 + rng.normal(0, 1, (sum(counts) + 1, size))
    gaussian, start = Gaussian(), 0
    for count in [*counts, 1]:
        gaussian.add(features[start : start + count].astype(np.float64))
        start += count
    np.testing.assert_allclose(gaussian.mean, features.mean(axis=0), rtol=1e-12)
    wanted = np.atleast_2d(np.cov(features, rowvar=False))
    np.testing.assert_allclose(gaussian.covariance, wanted, rtol=1e-6, atol=1e-8)


def test_too_few_features_are_refused():
    gaussian = Gaussian()
    with pytest.raises(ValueError, match="no features"):
        _ = gaussian.mean
    gaussian.add(np.ones((1, 3)))
    with pytest.raises(ValueError, match="at least 2"):
        _ = gaussian.covariance
    with pytest.raises(ValueError, match=r"\(n, d\)"):
        gaussian.add(np.ones(3))


def test_features_of_equal_pictures_are_close_and_of_others_far():
    rng = np.random.default_rng(0)
    sets = [Gaussian() for _ in range(3)]
    for gaussian, middle in zip(sets, (0.0, 0.0, 1.0), strict=True):
        gaussian.add(rng.normal(middle, 1, (4000, 8)))
    assert sets[0].distance(sets[1]) < 0.05 < 7 < sets[0].distance(sets[2]) < 9
