"""Which step a sigma belongs to, measured or not."""

from __future__ import annotations

from src.errors import UserError
from src.quant.artifacts import LayerConfig, QuantConfig
from src.quant.grid import activation_limit
from src.quant.schedule import Schedule, Step, spread_table
from src.sampling import sd3_sigmas

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

SIGMAS = tuple(float(s) for s in sd3_sigmas(30)[:-1])


def layer_of(seed: int, steps: int) -> LayerConfig:
    rng = np.random.default_rng(seed)
    scale = [float(s) for s in rng.uniform(0.01, 0.5, steps).astype(np.float32)]
    return LayerConfig([int(b) for b in rng.choice([4, 6, 8], steps)], scale)


def grid_at(layer: LayerConfig, sigma, sigmas=SIGMAS) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) scales and limits at one or several sigmas."""
    step = Step(Schedule(sigmas))
    step.set_sigma(sigma)
    scale, limit = step.grid(step.add(spread_table(layer.scale, layer.bits)), 1)
    return np.array(scale), np.array(limit)


@given(seed=st.integers(0, 2**16))
def test_calibrated_sigmas_have_their_own_scale_and_tier(seed):
    """Also when a sigma went through 16 or 32 bits, a thousandfold and back."""
    layer = layer_of(seed, 30)
    for sigmas in (np.float32(SIGMAS), np.float32(1000 * np.float32(SIGMAS)) / np.float32(1000)):
        scale, limit = grid_at(layer, mx.array(sigmas))
        np.testing.assert_array_equal(scale, np.float32(layer.scale))
        np.testing.assert_array_equal(limit, [activation_limit(b) for b in layer.bits])


@given(seed=st.integers(0, 2**16), sigma=st.floats(1e-3, 1.2), steps=st.sampled_from([1, 2, 7, 30]))
def test_other_sigmas_are_met_as_the_config_says(seed, sigma, steps):
    sigmas = SIGMAS[:: 30 // steps][:steps]
    layer = layer_of(seed, steps)
    config = QuantConfig({}, list(range(steps)), list(sigmas), {"layer": layer})
    nearest = min(abs(np.log(np.array(sigmas) / sigma)))
    if 1e-7 < nearest < 1e-4:
        return  # between the two tolerances
    bits, scale = config.at("layer", sigma)
    got_scale, got_limit = grid_at(layer, sigma, sigmas)
    assert got_limit[0] == activation_limit(bits)
    np.testing.assert_allclose(got_scale[0], scale, rtol=1e-4)


def test_the_wider_tier_of_two_neighbours_holds():
    layer = LayerConfig([4, 8], [0.4, 0.1])
    for sigma, limit in ((0.8, 7), (0.79, 127), (0.21, 127), (0.2, 127)):
        assert grid_at(layer, sigma, (0.8, 0.2))[1].tolist() == [limit]
    scale = grid_at(layer, 0.4, (0.8, 0.2))[0][0]
    np.testing.assert_allclose(scale * 127, np.sqrt(0.4 * 7 * 0.1 * 127), rtol=1e-5)


def test_beyond_the_ends_the_nearest_step_holds():
    layer = LayerConfig([4, 8], [0.4, 0.1])
    assert [a.tolist() for a in grid_at(layer, 1.0, (0.8, 0.2))] == [[np.float32(0.4)], [7]]
    assert [a.tolist() for a in grid_at(layer, 0.0, (0.8, 0.2))] == [[np.float32(0.1)], [127]]


def test_rows_of_a_batch_may_be_at_different_sigmas():
    layer = layer_of(0, 30)
    together = grid_at(layer, mx.array([SIGMAS[3], 0.5, SIGMAS[29]]))
    for row, sigma in enumerate((SIGMAS[3], 0.5, SIGMAS[29])):
        alone = grid_at(layer, sigma)
        assert [part[row] for part in together] == [part[0] for part in alone]


def test_vectors_are_linear_between_steps():
    step = Step(Schedule((0.8, 0.2)))
    vectors = mx.array([[0.0, 1.0], [2.0, 3.0]])
    step.set_sigma(0.4)
    np.testing.assert_allclose(np.array(step.vector(vectors, 3)), [[[1.0, 2.0]]], atol=1e-6)
    step.set_sigma(mx.array([0.8, 0.2]))
    np.testing.assert_array_equal(np.array(step.vector(vectors, 2)), np.array(vectors))
    np.testing.assert_array_equal(np.array(step.vector(vectors[:1], 3)), [0.0, 1.0])


def test_a_context_gives_back_the_level_before():
    step = Step(Schedule(SIGMAS))
    step.set_sigma(SIGMAS[4])
    with pytest.raises(RuntimeError), step.at(SIGMAS[9]):
        assert step.place.tolist() == [18]
        raise RuntimeError
    assert step.place.tolist() == [8]


def test_sigmas_far_outside_are_refused():
    schedule = Schedule((0.9, 0.7, 0.2))
    schedule.check([1.0, 0.9, 0.5, 0.2, 0.05])
    schedule.check(sd3_sigmas(50)[10:-1])
    with pytest.raises(UserError, match="sigma 1.2 is outside the calibrated range, 0.2 to 0.9"):
        schedule.check([0.5, 1.2])
    Schedule(SIGMAS).check(sd3_sigmas(50)[:-1])
    with pytest.raises(UserError, match="must fall and be above 0"):
        Schedule((0.2, 0.9))
    with pytest.raises(UserError, match="must fall and be above 0"):
        Schedule(())
