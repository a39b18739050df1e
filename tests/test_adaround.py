"""Learned rounding: its two parametrisations, the loop over a block, QDrop, bias correction."""

from __future__ import annotations

from dataclasses import replace

from src.models.configs import config_named
from src.models.mmdit import MMDiT
from src.models.paths import BLOCKS
from src.quant import grid
from src.quant.bias_correction import bias_correction
from src.quant.block_rounding import (
    METHODS,
    RoundingSettings,
    output_error,
    round_block,
)
from src.quant.learning import Learning, Steps, learn_rounding, minibatches
from src.quant.observe import input_statistics
from src.quant.qdrop import ActivationGrid, dropped_fake_quantize
from src.quant.rounding import (
    Layer,
    RectifiedSigmoid,
    StraightThrough,
    annealed_power,
    regulariser,
    start_between,
)
from src.quant.standin import BlockData, StandInBlock
from src.weight_track.blocks import run_block, stand_in_block

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .helpers import random_model

ROWS = 12
FC1 = "image_transformer_block.mlp.fc1"


def example(name: str = "tiny", index: int = 0, seed: int = 0) -> tuple[MMDiT, BlockData]:
    """A random model and what one of its blocks makes of random, correlated tokens."""
    model = random_model(config_named(name))
    rng, hidden = np.random.default_rng(seed), model.config.hidden
    mix = rng.standard_normal((hidden, hidden)).astype(np.float32) / 4 + np.eye(hidden)

    def drawn(*shape):
        return mx.array((rng.standard_normal((*shape, hidden)) @ mix).astype(np.float32))

    image, text, conditioning = drawn(ROWS, 16), drawn(ROWS, 6), drawn(ROWS)
    targets = run_block(model[BLOCKS][index], image, text, conditioning, ROWS)
    step = mx.array(np.arange(ROWS) % 3)
    return model, BlockData(image, text, conditioning, step, *targets)


QUICK = RoundingSettings(learning=Learning(iters=40, batch_size=4, seed=1))
MODEL, DATA = example()


def block() -> StandInBlock:
    return stand_in_block(MODEL, 0)


def nearest(block: StandInBlock, bits: int = 4):
    scales = {p: grid.absmax_scale(w, bits) for p, w in block.masters().items()}
    return {p: grid.nearest_codes(w, scales[p], bits) for p, w in block.masters().items()}, scales


@given(bits=st.integers(2, 8), seed=st.integers(0, 500), share=st.sampled_from([0.5, 1.0]))
def test_both_parametrisations_begin_at_their_codes(bits, seed, share):
    """What --iters 0 gives: hard rounding of the start is the initialisation."""
    rng = np.random.default_rng(seed)
    weight = mx.array(rng.standard_normal((6, 32)).astype(np.float32))
    scale = grid.absmax_scale(weight, bits) * 0.8
    low, high = grid.code_range(bits)
    moved = grid.nearest_codes(weight, scale, bits) + mx.array(rng.integers(-2, 3, (6, 32)))
    codes = mx.clip(moved, low, high)
    first = start_between(weight, scale, codes, share)
    for method in (StraightThrough(bits), RectifiedSigmoid(bits)):
        layer = Layer(scale, method.base(first))
        state = method.state(first, layer)
        assert mx.all(method.codes(state, layer) == codes).item()
    soft, _ = method.steps(state, layer)
    assert mx.allclose(soft, mx.clip(first, low, high), atol=1e-4).item()


@settings(max_examples=25)
@given(seed=st.integers(0, 500), power=st.floats(2, 20))
def test_sigmoid_gradient_is_that_of_loss_and_regulariser(seed, power):
    rng = np.random.default_rng(seed)
    method, alpha = RectifiedSigmoid(4), mx.array(rng.uniform(-2, 2, (5, 8)).astype(np.float32))
    base = mx.array(rng.integers(-7, 6, (5, 8)).astype(np.float32))
    layer = Layer(mx.ones((5, 1)), base)
    pull = mx.array(rng.standard_normal((5, 8)).astype(np.float32))

    def loss(alpha):
        value, _ = method.steps(alpha, layer)
        return (value * pull).sum() + 0.3 * alpha.size * regulariser(alpha, power)

    value, known = method.steps(alpha, layer)
    got = method.gradient(known, layer, pull, mx.array(0.3), mx.array(power))
    assert mx.allclose(got, mx.grad(loss)(alpha), rtol=1e-3, atol=1e-4).item()


@pytest.mark.parametrize("power", [1.1, 1.5, 2.0])
def test_the_gradient_is_finite_in_the_middle_also_below_the_square(power):
    alpha = mx.array([[0.0, 3e-8, -1e-8]])
    method, layer = RectifiedSigmoid(4), Layer(mx.ones((1, 1)), mx.zeros((1, 3)))
    _, known = method.steps(alpha, layer)
    pull = mx.zeros((1, 3))
    got = method.gradient(known, layer, pull, mx.array(0.3), mx.array(power))
    assert mx.isfinite(got).all().item()


def test_regulariser_is_0_when_decided_and_1_when_not():
    assert regulariser(mx.full((4,), 20.0), 5.0).item() == pytest.approx(0)
    assert regulariser(mx.full((4,), -20.0), 5.0).item() == pytest.approx(0)
    assert regulariser(mx.zeros((4,)), 5.0).item() == pytest.approx(1)


def test_exponent_waits_for_the_warmup_and_falls_to_its_end():
    powers = [annealed_power(done, 0.2, 20, 2) for done in np.linspace(0, 1, 50)]
    assert powers[0] == powers[9] == 20 and powers[-1] == pytest.approx(2)
    assert all(a >= b for a, b in zip(powers, powers[1:], strict=False))


@given(rows=st.integers(1, 20), batch=st.integers(1, 8), count=st.integers(0, 20))
def test_minibatches_take_every_row_before_any_again(rows, batch, count):
    drawn = minibatches(rows, batch, count, np.random.default_rng(0))
    assert drawn.shape == (count, min(batch, rows))
    for start in range(0, drawn.size - rows + 1, rows):
        assert sorted(drawn.reshape(-1)[start : start + rows]) == list(range(rows))


def test_stand_ins_compute_what_the_block_computes():
    image, text = block()(DATA)
    assert mx.allclose(image, DATA.target_image, atol=1e-4).item()
    assert mx.allclose(text, DATA.target_text, atol=1e-4).item()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_at_least_as_good_as_the_rungs_below(method):
    rounded = round_block(block(), DATA, replace(QUICK, method=method), step_keys=3)
    errors = list(rounded.error_db.values())
    assert list(rounded.error_db)[-1] == method
    assert rounded.error_db[rounded.kept] == max(errors)
    error = output_error(block(), DATA, rounded.codes, rounded.scales, 4)
    assert -10 * np.log10(error) == pytest.approx(rounded.error_db[rounded.kept], abs=0.01)
    low, high = grid.code_range(4)
    for codes in rounded.codes.values():
        assert codes.dtype == mx.int8 and low <= codes.min().item() <= codes.max().item() <= high
    assert all(scale.dtype == mx.float32 for scale in rounded.scales.values())


@pytest.mark.slow
@pytest.mark.parametrize("rounding, lr", [(StraightThrough(4), 3e-2), (RectifiedSigmoid(4), 1e-1)])
def test_learning_lessens_the_error_of_hard_rounding_and_ends_binary(rounding, lr):
    own = block()
    codes, scales = nearest(own)
    start = output_error(own, DATA, codes, scales, 4)
    settings = Learning(iters=120, batch_size=4, lr=lr, reg=0.01)
    found = learn_rounding(own, DATA, codes, scales, rounding, settings)
    assert output_error(own, DATA, found.codes, scales, 4) < 0.7 * start
    assert found.undecided < 0.02
    untouched = block().masters()
    assert all(mx.array_equal(w, untouched[p]) for p, w in own.masters().items())


@pytest.mark.parametrize("rounding", [StraightThrough(4), RectifiedSigmoid(4)])
def test_no_iterations_give_the_initialisation(rounding):
    own = block()
    codes, scales = nearest(own)
    found = learn_rounding(own, DATA, codes, scales, rounding, Learning(iters=0))
    assert all(mx.array_equal(found.codes[p], codes[p]) for p in codes)


@pytest.mark.slow
def test_same_seed_same_codes_other_seed_others():
    first, again, other = (
        round_block(
            block(), DATA, replace(QUICK, learning=replace(QUICK.learning, seed=s)), None, 3
        )
        for s in (1, 1, 2)
    )
    same = [mx.array_equal(first.codes[p], again.codes[p]).item() for p in first.codes]
    others = [mx.array_equal(first.codes[p], other.codes[p]).item() for p in first.codes]
    assert all(same) and not all(others)


@pytest.mark.slow
def test_compiled_steps_are_shared_and_give_the_same_to_rounding():
    own, second = block(), stand_in_block(MODEL, 0)
    codes, scales = nearest(own)
    settings, steps = Learning(iters=8, batch_size=4, seed=3), Steps(compiled=True)
    activations = {p: ActivationGrid(mx.full((3,), 0.05), mx.full((3,), 127.0)) for p in codes}
    for rounding in (StraightThrough(4), RectifiedSigmoid(4)):
        plain = learn_rounding(own, DATA, codes, scales, rounding, settings, activations)
        for each in (own, second):
            compiled = learn_rounding(
                each, DATA, codes, scales, rounding, settings, activations, steps=steps
            )
            assert compiled.history == pytest.approx(plain.history, rel=1e-2)
    assert len(steps._known) == 4  # two methods, with and without activations


@pytest.mark.parametrize(
    "name, index", [("tiny", 1), ("tiny-3.5-medium", 0), ("tiny-3.5-large", 0)]
)
def test_last_dual_and_normed_blocks_are_rounded_too(name, index):
    model, data = example(name, index)
    own = stand_in_block(model, index)
    assert len(own.stand_ins) == {"tiny": 9, "tiny-3.5-medium": 16, "tiny-3.5-large": 12}[name]
    rounded = round_block(own, data, QUICK, step_keys=3)
    assert rounded.error_db[rounded.kept] > rounded.error_db["rtn"]
    assert all(np.isfinite(list(rounded.error_db.values())))


def test_sixteen_bit_models_are_rounded_in_float32():
    model, data = example("tiny-3.5-large")
    model.set_dtype(mx.float16)
    own = stand_in_block(model, 0)
    assert all(w.dtype == mx.float32 for w in own.masters().values())
    rounded = round_block(own, data, QUICK, step_keys=3)
    assert rounded.error_db[rounded.kept] > rounded.error_db["rtn"]


def test_input_statistics_equal_plain_numpy():
    own, seen = block(), []
    own.set_hooks({FC1: lambda x: seen.append(np.array(x, dtype=np.float64)) or x})
    own(DATA)
    own.clear_hooks()
    flat = seen[0].reshape(-1, seen[0].shape[-1])
    statistics = input_statistics(own, DATA, batch_size=5)
    found = statistics[FC1]
    assert np.allclose(np.array(found.hessian), flat.T @ flat, rtol=1e-4, atol=1e-3)
    assert np.allclose(np.array(found.mean), flat.mean(axis=0), atol=1e-5)
    per_step = [np.abs(seen[0][np.arange(ROWS) % 3 == i]).max() for i in range(3)]
    assert np.allclose(np.array(found.absmax_per_step(DATA.step, 3)), per_step, rtol=1e-5)
    stream = "image_transformer_block.attn"
    assert statistics[f"{stream}.q_proj"] is statistics[f"{stream}.v_proj"]
    assert statistics[f"{stream}.q_proj"] is not found


def test_shift_and_smoothing_change_nothing_before_rounding():
    own = block()
    linear = MODEL[BLOCKS][0].image_transformer_block.mlp.fc1
    rng = np.random.default_rng(0)
    columns = linear.weight.shape[1]
    smoothing = mx.array(rng.uniform(0.25, 4, columns).astype(np.float32))
    shift = mx.array(rng.standard_normal(columns).astype(np.float32))
    stand_in = own.stand_ins[FC1].from_linear(linear, shift, smoothing)
    x = mx.array(rng.standard_normal((2, 3, columns)).astype(np.float32))
    assert mx.allclose(stand_in(x), linear(x), atol=1e-4).item()
    assert mx.allclose(stand_in.weight, linear.weight * smoothing).item()


def test_qdrop_quantizes_each_row_by_its_own_step_and_leaves_half_alone():
    x = mx.array(np.random.default_rng(0).standard_normal((4, 50, 64)).astype(np.float32))
    own = ActivationGrid(mx.array([0.5, 0.01]), mx.array([7.0, 127.0]))
    step, key = mx.array([0, 1, 0, 1]), mx.random.key(0)
    everything = dropped_fake_quantize(own, step, key, drop=0)(x)
    wanted = mx.concatenate(
        [
            grid.fake_quantize(x[i : i + 1], own.scale[s], 4 if s == 0 else 8)
            for i, s in enumerate([0, 1, 0, 1])
        ]
    )
    assert mx.allclose(everything, wanted, atol=1e-6).item()
    half = dropped_fake_quantize(own, step, key)(x)
    alone = mx.mean(half == x).item()
    assert 0.45 < alone < 0.55
    assert mx.all((half == x) | (half == everything)).item()


def test_qdrop_lets_gradients_through_where_nothing_is_clipped():
    own = ActivationGrid(mx.array([0.5]), mx.array([7.0]))
    x = mx.array([[[0.3, -1.2, 9.0]]])
    slope = mx.grad(
        lambda x: dropped_fake_quantize(own, mx.array([0]), mx.random.key(0), 0)(x).sum()
    )
    assert np.array(slope(x)).tolist() == [[[1, 1, 0]]]


def test_bias_correction_restores_the_mean_output():
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((8, 32)), rng.standard_normal((100, 32)) + 3
    rounded = np.round(weight)
    added = bias_correction(mx.array(weight), mx.array(rounded), mx.array(x.mean(axis=0)))
    assert np.allclose((x @ rounded.T).mean(0) + np.array(added), (x @ weight.T).mean(0), atol=1e-4)
