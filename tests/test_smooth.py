"""SmoothQuant: the factors, and a search that never makes a layer worse."""

from __future__ import annotations

from src.quant import smooth

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st


def rows(rng, channels, wide=(), factor=60.0, bits=8):
    x = rng.standard_normal((96, channels)).astype(np.float32)
    x[:, list(wide)] *= factor
    return [smooth.Rows(x[:48], bits), smooth.Rows(x[48:], bits)]


def reader(samples, weight, shift=None):
    offset = 0.0 if shift is None else shift
    widths = np.max([np.abs(sample.x - offset).max(axis=0) for sample in samples], axis=0)
    return smooth.Reader(samples, weight, widths, shift)


def search(samples, weight, shift=None):
    return smooth.search([reader(samples, weight, shift)])


@given(
    seed=st.integers(0, 999),
    channels=st.integers(1, 40),
    strength=st.floats(0, 1),
    zeros=st.booleans(),
)
def test_factors_are_bounded_and_leave_empty_channels_alone(seed, channels, strength, zeros):
    rng = np.random.default_rng(seed)
    inputs, weights = np.exp(rng.normal(0, 4, (2, channels)))
    if zeros:
        inputs[0] = 0
    found = smooth.factors(inputs, weights, strength)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    assert (found >= 1 / 32).all() and (found <= 32).all()
    if zeros:
        assert found[0] == 1


def test_strength_zero_is_none_and_one_levels_the_input():
    inputs, weights = np.array([1.0, 4.0, 16.0]), np.ones(3)
    assert (smooth.factors(inputs, weights, 0.0) == 1).all()
    assert np.ptp(inputs / smooth.factors(inputs, weights, 1.0)) < 1e-5


def test_outlier_channels_are_smoothed_and_the_error_falls():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, 64)).astype(np.float32)
    weight[:, [5, 40]] *= 0.02  # wide inputs meet narrow weights, as in trained models
    found = search(rows(rng, 64, wide=[5, 40]), weight)
    assert found.strength > 0 and found.error < 0.7 * found.error_without
    assert found.smoothing[5] > 2 * np.median(found.smoothing)


@given(seed=st.integers(0, 50), bits=st.sampled_from([4, 6, 8]), wide=st.integers(0, 3))
def test_the_search_never_makes_a_layer_worse(seed, bits, wide):
    rng = np.random.default_rng(seed)
    samples = rows(rng, 16, wide=range(wide), bits=bits)
    found = search(samples, rng.standard_normal((8, 16)).astype(np.float32))
    assert found.error <= found.error_without
    assert (found.smoothing is None) == (found.strength == 0)


def test_a_level_input_is_left_alone():
    rng = np.random.default_rng(1)
    weight = rng.choice([-1.0, 1.0], (8, 32)).astype(np.float32) * 7
    samples = [smooth.Rows(rng.choice([-1.0, 1.0], (64, 32)).astype(np.float32), 8)]
    found = search(samples, weight)
    assert found.strength == 0 and found.error == pytest.approx(0, abs=1e-9)


def test_zero_channels_and_a_shift_give_finite_results():
    rng = np.random.default_rng(2)
    samples = rows(rng, 12, wide=[3], bits=6)
    for sample in samples:
        sample.x[:, 7] = 0
    weight = rng.standard_normal((6, 12)).astype(np.float32)
    weight[:, 9] = 0
    shift = np.full(12, 0.5, np.float32)
    found = search(samples, weight, shift)
    assert np.isfinite(found.error) and found.error <= found.error_without


def test_inputs_that_hang_together_share_their_factors():
    """o_proj of both streams: one strength for both, and no worse than none for their mean."""
    rng = np.random.default_rng(3)
    weights = [rng.standard_normal((24, 24)).astype(np.float32) for _ in range(2)]
    weights[0][:, 2] *= 0.02
    readers = [
        reader(rows(rng, 24, wide=[2]), weights[0]),
        reader(rows(rng, 24), weights[1]),
    ]
    found = smooth.search(readers)
    assert found.strength > 0 and found.error < found.error_without
    assert found.smoothing.shape == (24,)
