"""Activation statistics: against NumPy on dumped activations, and any split folds to the same."""

from __future__ import annotations

from src.calibration import histogram, reductions, statistics
from src.errors import UserError
from src.models.configs import config_named
from src.models.paths import block_linears, input_of, replaced

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .helpers import random_inputs, random_model

SAMPLES = 2


class Dump(nn.Module):
    """A linear that keeps what it was given."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear, self._seen = linear, []

    def __call__(self, x: mx.array) -> mx.array:
        self._seen.append(x)
        return self.linear(x)


@pytest.fixture(scope="module")
def model():
    return random_model(config_named("tiny-3.5-medium"))


@pytest.fixture(scope="module")
def inputs(model):
    """Two samples under guidance, at different timesteps."""
    rows = random_inputs(model.config, 8, 6, batch=2 * SAMPLES)
    return (*rows, mx.array([900.0, 300.0] * 2))


@pytest.fixture(scope="module")
def dumped(model, inputs):
    """Per linear (samples, rows, channels) float64, in the order of the forward."""
    dumps = {path: Dump(linear) for path, linear in block_linears(model).items()}
    with replaced(model, dumps):
        mx.eval(model(*inputs))
    arrays = {}
    for path, dump in dumps.items():
        (x,) = (np.array(seen, dtype=np.float64) for seen in dump._seen)
        halves = np.split(x.reshape(2 * SAMPLES, -1, x.shape[-1]), 2)
        arrays[path] = np.concatenate(halves, axis=1)
    return arrays


def test_statistics_equal_numpy_on_dumped_activations(model, inputs, dumped):
    found = statistics.collect(model, inputs, SAMPLES)
    assert [set(sample) for sample in found] == [set(map(input_of, dumped))] * SAMPLES
    for path, arrays in dumped.items():
        for sample, x in zip(found, arrays, strict=True):
            got = sample[input_of(path)]
            scale = np.abs(x).max()
            wanted = {
                "minimum": x.min(axis=0),
                "maximum": x.max(axis=0),
                "mean": x.mean(axis=0),
                "square": (x**2).mean(axis=0),
            }
            for name, value in wanted.items():
                unit = scale**2 if name == "square" else scale
                assert np.abs(got[name] - value).max() <= 1e-5 * unit, (path, name)


def test_q_k_and_v_do_read_one_input(dumped):
    shared = [path for path in dumped if input_of(path) != path]
    assert len(shared) == 2 * (3 * 2 + 2)  # two streams of three blocks, two second attentions
    for path in shared:
        assert np.array_equal(dumped[path], dumped[input_of(path)])


def test_the_model_is_left_as_it_was_and_gives_the_same_velocity(model, inputs):
    before, linears = np.array(model(*inputs)), block_linears(model)
    statistics.collect(model, inputs, SAMPLES)
    after = block_linears(model)
    assert all(after[path] is linear for path, linear in linears.items())
    assert np.array_equal(np.array(model(*inputs)), before)


def test_a_sample_does_not_depend_on_its_batch(model, inputs):
    together = statistics.collect(model, inputs, SAMPLES)
    for index, sample in enumerate(together):
        rows = mx.array([index, SAMPLES + index])
        (alone,) = statistics.collect(model, tuple(x[rows] for x in inputs), 1)
        for path, found in sample.items():
            for name in ("minimum", "maximum", "mean", "square"):
                assert np.allclose(found[name], alone[path][name], rtol=1e-4, atol=1e-5)
            assert found["hist"].sum() == alone[path]["hist"].sum()


def test_only_post_gelu_inputs_have_a_centred_histogram(model, inputs):
    (first, _) = statistics.collect(model, inputs, SAMPLES)
    assert {path for path, s in first.items() if statistics.CENTRED in s} == {
        path for path in block_linears(model) if path.endswith("mlp.fc2")
    }


def sample_of(x: np.ndarray, channels: int, centred: bool = False) -> statistics.Sample:
    rows = mx.array(x.astype(np.float32).reshape(2, -1, channels))
    reduced = reductions.reduce_input(rows, 1, centred)
    return reductions.sample_at(0, *map(np.array, reduced))


def test_moving_shift_follows_its_formula_and_begins_with_the_first_sample():
    rng = np.random.default_rng(0)
    samples = [sample_of(rng.standard_normal((8, 3)) + i, 3, centred=True) for i in range(4)]
    centres = [(s["minimum"] + s["maximum"]) / 2 for s in samples]
    wanted = centres[0]
    for centre in centres[1:]:
        wanted = 0.95 * wanted + 0.05 * centre
    folded = statistics.fold(samples)
    assert np.allclose(folded["shift"], wanted, rtol=1e-6)
    assert np.allclose(folded["avg_min"], np.mean([s["minimum"] for s in samples], axis=0))
    assert np.allclose(folded["avg_max"], np.mean([s["maximum"] for s in samples], axis=0))
    assert np.array_equal(folded["minimum"], np.min([s["minimum"] for s in samples], axis=0))


def test_fold_of_samples_is_the_statistics_of_all_rows():
    rng = np.random.default_rng(1)
    parts = [rng.standard_normal((2, 10, 5)) * (1 + i) for i in range(3)]
    folded = statistics.fold([sample_of(part, 5) for part in parts])
    rows = np.concatenate(parts).reshape(-1, 5)
    assert np.allclose(folded["mean"], rows.mean(axis=0), atol=1e-6)
    assert np.allclose(folded["square"], (rows**2).mean(axis=0), rtol=1e-5)
    assert folded["hist"].sum() == rows.size


def test_a_single_sample_and_all_zero_channels_have_defined_statistics():
    x = np.random.default_rng(2).standard_normal((2, 6, 4))
    x[..., 1] = 0
    folded = statistics.fold([sample_of(x, 4, centred=True)])
    assert all(np.isfinite(value).all() for value in folded.values())
    assert folded["minimum"][1] == folded["maximum"][1] == folded["shift"][1] == 0
    assert np.array_equal(folded["avg_min"], folded["minimum"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(bad):
    x = np.zeros((2, 4, 3))
    x[1, 2, 1] = bad
    with pytest.raises(UserError, match="block.fc1 is not finite at step 4 of image 2, channel 1"):
        statistics.check_finite({"block.fc1": sample_of(x, 3)}, "step 4 of image 2")


@given(
    seed=st.integers(0, 999),
    scale=st.floats(0.01, 100),
    heavy=st.booleans(),
    size=st.integers(1, 5000),
)
def test_percentiles_are_within_one_bin_of_the_counted_values(seed, scale, heavy, size):
    rng = np.random.default_rng(seed)
    x = (rng.standard_t(2, size) if heavy else rng.standard_normal(size)) * scale
    counts = np.array(histogram.count(mx.array(x.astype(np.float32))[None]))[0]
    assert counts.sum() == size
    largest = np.abs(x).max()
    assert histogram.percentile(counts, 1.0, largest) == largest
    for share in (0.5, 0.99, 0.999):
        # The same definition on sorted values, so that only the bins' width is left.
        exact = np.sort(np.abs(x))[max(0, int(np.ceil(share * size)) - 1)]
        got = histogram.percentile(counts, share, largest)
        assert abs(got - exact) <= max(0.0626 * exact, 2.0**-18)


def test_the_tally_of_bin_numbers_is_the_count():
    x = mx.random.normal((3, 1000), key=mx.random.key(1))
    tallied = histogram.tally(np.array(reductions.numbers(x)))
    assert np.array_equal(tallied, np.array(histogram.count(x)))


def test_bins_agree_with_numpy():
    edges = histogram.edges()
    assert len(edges) == histogram.BINS + 1 and (np.diff(edges) > 0).all()
    rng = np.random.default_rng(3)
    x = np.concatenate([np.exp(rng.uniform(-14, 12, 4000)), [0.0, 1e-9, 1e9, -2.5, 65504]])
    x = x.astype(np.float32)
    numbers = np.array(histogram.bin_numbers(mx.array(x)))
    wanted = np.clip(np.searchsorted(edges, np.abs(x), side="right") - 1, 0, histogram.BINS - 1)
    assert np.array_equal(numbers, wanted)


@given(values=st.integers(1, 10**8), channels=st.integers(1, 6144))
def test_counting_is_bounded_and_reaches_every_channel(values, channels):
    stride = histogram.counting_stride(values, channels)
    assert np.gcd(stride, channels) == 1
    assert values / stride <= max(histogram.COUNTED_VALUES, values * histogram.COUNTED_SHARE) + 1


def test_points_stand_for_the_counts():
    counts = np.zeros(histogram.BINS, dtype=np.int64)
    counts[[200, 300]] = [6, 2]
    values, weights = histogram.points(counts)
    assert weights.sum() == 8 and len(values) == len(weights)
    low, high = histogram.edges()[200], histogram.edges()[201]
    assert ((values > low) & (values < high)).sum() * 2 == len(values)
