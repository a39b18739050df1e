"""Modules by path, and the integer grids."""

from __future__ import annotations

from src.errors import UserError
from src.models.configs import config_named
from src.models.paths import block_linears, module_at, replaced, set_module
from src.quant import grid

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .helpers import random_inputs, random_model

FC2 = "multimodal_transformer_blocks.1.image_transformer_block.mlp.fc2"


def test_linears_are_found_in_block_order_without_modulation():
    paths = list(block_linears(random_model(config_named("tiny"))))
    assert len(paths) == 2 * 12 - 3 and FC2 in paths
    assert not any("adaLN" in p or "final_layer" in p or "embedder" in p for p in paths)
    assert [p.split(".")[1] for p in paths] == sorted(p.split(".")[1] for p in paths)


def test_replaced_modules_come_back_whatever_happens():
    model = random_model(config_named("tiny"))
    inputs = (*random_inputs(model.config, 4, 4), mx.array([1.0, 2.0]))
    real, before = module_at(model, FC2), np.array(model(*inputs))
    with pytest.raises(RuntimeError), replaced(model, {FC2: nn.Identity()}):
        assert module_at(model, FC2) is not real
        raise RuntimeError
    assert module_at(model, FC2) is real
    assert np.array_equal(np.array(model(*inputs)), before)
    set_module(model, "multimodal_transformer_blocks.0", real)
    assert model.multimodal_transformer_blocks[0] is real


@pytest.mark.parametrize("path", ["blocks.0", "multimodal_transformer_blocks.9.x", FC2 + ".w.x"])
def test_a_path_that_leads_nowhere_is_named(path):
    with pytest.raises(UserError, match="leads nowhere"):
        module_at(random_model(config_named("tiny")), path)


@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_rounding_error_is_at_most_half_a_step(bits, rows, groups, seed):
    weight = mx.array(np.random.default_rng(seed).standard_normal((rows, 32 * groups)))
    scale = grid.absmax_scale(weight, bits, 32)
    codes = grid.nearest_codes(weight, scale, bits)
    low, high = grid.code_range(bits)
    assert scale.shape == (rows, groups) and scale.dtype == mx.float32 and codes.dtype == mx.int8
    assert low <= codes.min().item() and codes.max().item() <= high
    error = mx.abs(grid.dequantize(codes, scale) - weight)
    assert mx.all(error <= 0.5001 * grid.spread(scale, weight.shape[1])).item()


@given(bits=st.sampled_from([4, 6, 8]), shifted=st.booleans(), seed=st.integers(0, 99))
def test_activations_round_to_the_grid_and_clip(bits, shifted, seed):
    rng = np.random.default_rng(seed)
    x = mx.array(rng.standard_normal((3, 8)).astype(np.float32))
    shift = mx.array(rng.standard_normal(8).astype(np.float32)) if shifted else None
    scale, limit = mx.array(0.05), grid.activation_limit(bits)
    codes = grid.activation_codes(x, scale, bits, shift)
    wanted = np.clip(
        np.round((np.array(x) - (0 if shift is None else np.array(shift))) / 0.05), -limit, limit
    )
    assert np.abs(np.array(codes) - wanted).max() <= 1  # ties may fall either way
    assert mx.all(mx.abs(codes) <= limit).item() and mx.all(codes == mx.round(codes)).item()
    back = grid.fake_quantize(x, scale, bits, shift)
    inside = mx.abs(codes) < limit
    assert mx.all(mx.where(inside, mx.abs(back - x), 0) <= 0.0251).item()


def test_zero_rows_have_zero_codes():
    scale = grid.absmax_scale(mx.zeros((2, 8)), 4)
    assert mx.all(scale > 0).item() and not mx.any(grid.nearest_codes(mx.zeros((2, 8)), scale, 4))


def test_impossible_grids_are_named():
    for bits in (1, 9):
        with pytest.raises(UserError, match=f"2 to 8, got {bits}"):
            grid.check_bits(bits)
    with pytest.raises(UserError, match="valid: 0, 32, 64, 128"):
        grid.absmax_scale(mx.zeros((2, 100)), 4, 50)
    with pytest.raises(UserError, match="64 does not divide 100"):
        grid.absmax_scale(mx.zeros((2, 100)), 4, 64)
