"""Decibels, similarity of pictures, and fidelity along the 16-bit model's own trajectories."""

from __future__ import annotations

import math
from dataclasses import replace

from src.errors import UserError
from src.metrics.fidelity import bootstrap_interval, reference_trajectories, teacher_forced_sqnr
from src.metrics.psnr import psnr
from src.metrics.signal import sqnr_db
from src.metrics.ssim import ssim
from src.models.load import load_pipeline
from src.quant.modulated import Memory

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

CAPTIONS = [
    "a large red star in the center on a night background",
    "a small blue ring at the top on a night background",
]


def test_sqnr_of_known_errors():
    x = mx.array([3.0, -4.0])
    assert sqnr_db(x, x * 1.1) == pytest.approx(20, abs=1e-3)
    assert sqnr_db(x, x) == math.inf and sqnr_db(mx.zeros((2,)), x) == -math.inf


def test_psnr_of_pictures_does_not_wrap_around():
    grey = np.full((16, 16, 3), 100, np.uint8)
    assert psnr(grey, grey) == math.inf
    assert psnr(grey, grey - 1) == psnr(grey - 1, grey) == pytest.approx(48.1308, abs=1e-3)
    assert psnr(np.zeros(4), np.full(4, 0.1), peak=1) == pytest.approx(20)
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert psnr(black, white) == 0


def ssim_by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """Window by window, moments about the weighted means, as the paper writes them."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / 4.5)
    window /= window.sum()
    found = []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            for channel in range(x.shape[2]):
                here = np.s_[row : row + 11, column : column + 11, channel]
                a, b = x[here].astype(float), y[here].astype(float)
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (
                    (window * (a - mean_a) ** 2).sum(),
                    (window * (b - mean_b) ** 2).sum(),
                )
                both = (window * (a - mean_a) * (b - mean_b)).sum()
                top = (2 * mean_a * mean_b + 6.5025) * (2 * both + 58.5225)
                bottom = (mean_a**2 + mean_b**2 + 6.5025) * (var_a + var_b + 58.5225)
                found.append(top / bottom)
    return float(np.mean(found))


@given(seed=st.integers(0, 2**31), noise=st.floats(0, 80))
@settings(max_examples=10)
def test_ssim_is_what_the_paper_defines(seed, noise):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (14, 13, 3)).astype(np.uint8)
    y = np.clip(x + noise * rng.standard_normal(x.shape), 0, 255).astype(np.uint8)
    assert ssim(x, y) == pytest.approx(ssim_by_definition(x, y), abs=1e-9)
    assert ssim(x, y) == pytest.approx(ssim(y, x), abs=1e-12) and ssim(x, x) == 1


def test_ssim_sees_structure_rather_than_brightness():
    rng = np.random.default_rng(0)
    x = np.kron(rng.integers(60, 200, (6, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    brighter = x + np.uint8(20)
    noisy = np.clip(x + 20.0 * rng.choice([-1, 1], x.shape), 0, 255).astype(np.uint8)
    assert psnr(x, brighter) == pytest.approx(psnr(x, noisy), abs=0.1)
    assert ssim(x, brighter) > 0.9 > ssim(x, noisy)
    assert ssim(x, 255 - x) < 0
    flat = [np.full((11, 11, 1), level, np.uint8) for level in (100, 150)]
    assert ssim(*flat) == pytest.approx((2 * 15000 + 6.5025) / (10000 + 22500 + 6.5025))


def test_ssim_refuses_what_it_cannot_compare():
    with pytest.raises(UserError, match="cannot be compared"):
        ssim(np.zeros((16, 16, 3)), np.zeros((16, 8, 3)))
    with pytest.raises(UserError, match="smaller than SSIM's 11 pixels"):
        ssim(np.zeros((8, 16, 3)), np.zeros((8, 16, 3)))


def test_the_same_model_has_no_error_and_a_disturbed_one_has_it_at_every_step():
    pipeline = load_pipeline("tiny")
    reference = reference_trajectories(pipeline, CAPTIONS, num_steps=6, stride=2)
    assert reference.captions == 2 and len(reference.sigmas) == 3 and reference.sigmas[0] == 1
    same = teacher_forced_sqnr(pipeline.transformer, reference)
    assert same.shape == (3, 2) and np.all(same > 100)
    halved = teacher_forced_sqnr(lambda *inputs: 0.9 * pipeline.transformer(*inputs), reference)
    assert np.allclose(halved, 20, atol=0.01)


@pytest.mark.parametrize("cfg_weight", [4.0, 0.0])
def test_layers_know_whether_prompts_stand_beside_negative_ones(cfg_weight):
    pipeline = load_pipeline("tiny")
    pipeline.defaults = replace(pipeline.defaults, cfg_weight=cfg_weight)
    reference = reference_trajectories(pipeline, CAPTIONS, num_steps=2, stride=2)
    memory = pipeline.transformer.memory = Memory()
    teacher_forced_sqnr(pipeline.transformer, reference)
    assert memory.guided == (cfg_weight > 0)


def test_interval_holds_the_mean_and_narrows_with_more_captions():
    values = np.random.default_rng(0).normal(1.0, 0.5, 400)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    few = bootstrap_interval(values[:25])
    assert few[1] - few[0] > 2 * (high - low)
    assert bootstrap_interval(values) == (low, high)
