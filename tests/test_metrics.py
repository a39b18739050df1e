"""Decibels, and fidelity along the 16-bit model's own trajectories."""

from __future__ import annotations

import math

from src.metrics.fidelity import bootstrap_interval, reference_trajectories, teacher_forced_sqnr
from src.metrics.signal import psnr, sqnr_db
from src.models.load import load_pipeline

import mlx.core as mx
import numpy as np
import pytest

CAPTIONS = [
    "a large red star in the center on a night background",
    "a small blue ring at the top on a night background",
]


def test_sqnr_and_psnr_of_known_errors():
    x = mx.array([3.0, -4.0])
    assert sqnr_db(x, x * 1.1) == pytest.approx(20, abs=1e-3)
    assert sqnr_db(x, x) == math.inf and sqnr_db(mx.zeros((2,)), x) == -math.inf
    assert psnr(mx.zeros((4,)), mx.full((4,), 0.1)) == pytest.approx(20, abs=1e-3)
    assert psnr(mx.zeros((4,)), mx.full((4,), 25.5), peak=255) == pytest.approx(20, abs=1e-3)


def test_the_same_model_has_no_error_and_a_disturbed_one_has_it_at_every_step():
    pipeline = load_pipeline("tiny")
    reference = reference_trajectories(pipeline, CAPTIONS, num_steps=6, stride=2)
    assert reference.captions == 2 and len(reference.sigmas) == 3 and reference.sigmas[0] == 1
    same = teacher_forced_sqnr(pipeline.transformer, reference)
    assert same.shape == (3, 2) and np.all(same > 100)
    halved = teacher_forced_sqnr(lambda *inputs: 0.9 * pipeline.transformer(*inputs), reference)
    assert np.allclose(halved, 20, atol=0.01)


def test_interval_holds_the_mean_and_narrows_with_more_captions():
    values = np.random.default_rng(0).normal(1.0, 0.5, 400)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    few = bootstrap_interval(values[:25])
    assert few[1] - few[0] > 2 * (high - low)
    assert bootstrap_interval(values) == (low, high)
