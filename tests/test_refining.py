"""Tuning codes, scales and biases together: the gradients, and that a whole network gains."""

from __future__ import annotations

from src.adaround_optimize import adaround_optimize
from src.analyze_activations import analyze_activations
from src.cache_adaround_data import cache_adaround_data
from src.collect_layer_activations import collect_layer_activations
from src.generate_calibration_data import generate_calibration_data
from src.inference.open import open_quantized
from src.metrics.fidelity import reference_trajectories, teacher_forced_sqnr
from src.models.load import load_pipeline
from src.models.prompts import load_prompts
from src.quant import grid
from src.quant.artifacts import QuantConfig, load_rounded_block
from src.quant.refining import Rates, Refiner, Tuned, weights_and_biases, zero_moments
from src.store import read_json
from src.weight_track.apply import rounded_weights

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def example(seed: int, group_size: int = 0, rows: int = 6, columns: int = 64):
    rng = np.random.default_rng(seed)
    weight = mx.array(rng.standard_normal((rows, columns)).astype(np.float32))
    scale = grid.absmax_scale(weight, 4, group_size)
    bias = mx.array(rng.standard_normal(rows).astype(np.float32))
    return rng, weight, Tuned(scale, bias, 4)


@given(seed=st.integers(0, 500), group_size=st.sampled_from([0, 32]))
def test_begins_with_the_codes_scales_and_bias_that_it_was_given(seed, group_size):
    rng, weight, layer = example(seed, group_size)
    codes = mx.clip(
        grid.nearest_codes(weight, layer.scale, 4) + mx.array(rng.integers(-2, 3, weight.shape)),
        *grid.code_range(4),
    )
    state = layer.state(weight, codes)
    assert mx.all(layer.codes(state) == codes).item()
    dequantized, bias = layer.weight_and_bias(state)
    assert mx.allclose(dequantized, grid.dequantize(codes, layer.scale), rtol=1e-6).item()
    assert mx.all(bias == layer.bias).item()


@settings(max_examples=25)
@given(seed=st.integers(0, 500), group_size=st.sampled_from([0, 32]))
def test_gradients_of_scales_and_biases_are_those_of_the_loss(seed, group_size):
    rng, weight, layer = example(seed, group_size)
    state = layer.state(weight, grid.nearest_codes(weight, layer.scale, 4))
    pull = mx.array(rng.standard_normal(weight.shape).astype(np.float32))
    push = mx.array(rng.standard_normal(len(weight)).astype(np.float32))

    def loss(learned):
        found, bias = layer.weight_and_bias({**state, **learned})
        return (found * pull).sum() + (bias * push).sum()

    learned = {kind: state[kind] for kind in ("log_ratio", "bias_steps")}
    wanted = mx.grad(loss)(learned)
    got = layer.gradient(state, pull, push)
    for kind in learned:
        assert mx.allclose(got[kind], wanted[kind], rtol=1e-3, atol=1e-4).item()
    # Straight through: as if codes were the state itself, in steps of the grid.
    assert mx.allclose(got["steps"], pull * grid.spread(layer.scale, 64), rtol=1e-5).item()


def test_a_linear_learns_to_serve_the_loss_better_than_nearest_rounding():
    rng, weight, layer = example(7, rows=8)
    mix = rng.standard_normal((64, 64)) / 8 + 0.5
    x = mx.array((rng.standard_normal((256, 64)) @ mix).astype(np.float32))
    target = x @ weight.T + layer.bias

    def error(weights, biases, batch):
        return mx.square(batch @ weights["a"].T + biases["a"] - target).mean()

    layers = {"a": layer}
    states = {"a": layer.state(weight, grid.nearest_codes(weight, layer.scale, 4))}
    first = error(*weights_and_biases(layers, states), x).item()
    refiner, moments = Refiner(layers, error), zero_moments(states)
    for iteration in range(200):
        states, moments, _ = refiner.step(
            states, moments, x, Rates().at(iteration / 200, iteration)
        )
    assert error(*weights_and_biases(layers, states), x).item() < 0.3 * first


@pytest.mark.slow
def test_refining_keeps_to_the_smoothing_and_shift_of_a_quant_config(tmp_path):
    """What is tuned must be what the loader then runs."""
    calibration = generate_calibration_data(
        "tiny", tmp_path / "c", num_images=3, num_steps=4, height=64, width=64
    )
    cache = cache_adaround_data(calibration, num_images=3, stride=1)
    config = analyze_activations(
        collect_layer_activations(calibration, num_images=3), tiers=(8,), smooth="all"
    )
    layers = QuantConfig.load(config).layers.values()
    assert any(layer.smoothing is not None for layer in layers)
    assert any(layer.shift is not None for layer in layers)
    told = []
    for iterations in (0, 60):
        folder = adaround_optimize(
            cache,
            tmp_path / f"o{iterations}",
            method="grid",
            refine=iterations,
            quant_config=config,
        )
        pipeline = load_pipeline("tiny")
        captions = load_prompts(f"{pipeline.prompts}_evaluation")[:4]
        reference = reference_trajectories(pipeline, captions, num_steps=4)
        quantized = open_quantized(pipeline, folder, config, weights_only=True)
        told.append(teacher_forced_sqnr(quantized.pipeline.transformer, reference).mean())
    assert told[1] > told[0] + 1


@pytest.mark.slow
def test_refining_serves_captions_that_it_never_saw(tmp_path):
    calibration = generate_calibration_data(
        "tiny", tmp_path / "c", num_images=4, num_steps=6, height=64, width=64
    )
    cache = cache_adaround_data(calibration, num_images=4, stride=2)
    folder = adaround_optimize(cache, tmp_path / "o", method="rtn", refine=60, batch_size=8)
    found = read_json(folder / "config.json", "ditq-adaround", 1)["refined"]
    assert found["kept"] and max(found["velocity_db"]) > found["velocity_db"][0] + 1
    pipeline = load_pipeline("tiny")
    captions = load_prompts(f"{pipeline.prompts}_evaluation")[:4]
    reference = reference_trajectories(pipeline, captions, num_steps=6)
    gained = []
    for part in ("blocks", "weights"):
        with rounded_weights(pipeline.transformer, folder, part):
            gained.append(teacher_forced_sqnr(pipeline.transformer, reference).mean())
    assert gained[1] > gained[0] + 1
    refined = load_rounded_block(folder, 0)
    assert all(np.abs(layer.codes).max() <= 8 for layer in refined.values())
