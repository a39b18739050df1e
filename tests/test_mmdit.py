"""The transformer against an independent forward, and what a caller may rely on."""

from __future__ import annotations

from dataclasses import replace

from src.errors import UserError
from src.models.configs import CONFIGS, MMDiTConfig, config_named
from src.models.embedding import timestep_features
from src.models.gelu import gelu_of_power
from src.models.mmdit import MMDiT

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from .helpers import random_inputs, random_model, relative_error
from .mmdit_reference import forward

TINY = ("tiny", "tiny-3.5-medium", "tiny-3.5-large")


def reference(model: MMDiT, latent, text, pooled, timestep) -> np.ndarray:
    weights = {k: np.array(v, dtype=np.float64) for k, v in tree_flatten(model.parameters())}
    inputs = (np.array(x, dtype=np.float64) for x in (latent, text, pooled, timestep))
    return forward(weights, model.config, *inputs)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("gelu", ["tanh", "exact"])
@pytest.mark.parametrize("size", [(16, 16), (4, 10), (2, 2)])
def test_equals_independent_forward(name, gelu, size):
    """With k biases, QK norm and dual attention; centre-cropped positions; mixed timesteps."""
    config = replace(config_named(name), gelu=gelu)
    model = random_model(config)
    inputs = random_inputs(config, *size)
    timestep = mx.array([987.25, 3.5])
    out = model(*inputs, timestep)
    assert relative_error(out, reference(model, *inputs, timestep)) < 1e-5


@given(
    heads=st.integers(1, 3),
    depth=st.integers(1, 3),
    dual=st.integers(0, 3),
    qk_norm=st.booleans(),
    k_bias=st.booleans(),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    tokens=st.integers(1, 6),
    timestep=st.floats(0, 1000),
)
@settings(max_examples=25)
def test_any_shape_equals_independent_forward(
    heads, depth, dual, qk_norm, k_bias, rows, columns, tokens, timestep
):
    config = MMDiTConfig(
        depth=depth,
        hidden=16 * heads,
        heads=heads,
        text_dim=12,
        pooled_dim=10,
        position_size=4,
        qk_norm=qk_norm,
        k_bias=k_bias,
        dual_attention_blocks=min(dual, depth),
    )
    model = random_model(config, seed=depth)
    inputs = random_inputs(config, 2 * rows, 2 * columns, batch=1, tokens=tokens)
    time = mx.array([timestep])
    out = model(*inputs, time)
    assert out.shape == inputs[0].shape
    # Looser than above: large timesteps cost float32 digits of the phase, small models magnify it.
    assert relative_error(out, reference(model, *inputs, time)) < 1e-4


@pytest.mark.parametrize("name", TINY)
def test_mixed_timesteps_equal_single_runs(name):
    model = random_model(config_named(name))
    latent, text, pooled = random_inputs(model.config, 8, 12, batch=3)
    timesteps = mx.array([1000.0, 500.0, 2.5])
    together = model(latent, text, pooled, timesteps)
    for i in range(3):
        row = slice(i, i + 1)
        alone = model(latent[row], text[row], pooled[row], timesteps[row])
        assert relative_error(together[row], alone) < 1e-6


@pytest.mark.parametrize("name", TINY)
def test_compile_changes_nothing_and_no_state_survives(name):
    model = random_model(config_named(name))
    inputs = (*random_inputs(model.config, 8, 8), mx.array([700.0, 70.0]))
    before = {k: np.array(v) for k, v in tree_flatten(model.parameters())}
    first = np.array(model(*inputs))
    model(*random_inputs(model.config, 4, 12, batch=1, tokens=9, seed=5), mx.array([1.0]))
    assert np.array_equal(first, np.array(model(*inputs)))
    compiled = mx.compile(lambda *x: model(*x), inputs=model.state)
    assert relative_error(compiled(*inputs), first) < 1e-6
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[k], np.array(after[k])) for k in before)


def test_k_bias_matters():
    """Joint attention mixes two streams whose k biases differ, so softmax does not cancel them."""
    model = random_model(config_named("tiny"))
    inputs = (*random_inputs(model.config, 8, 8), mx.array([500.0, 500.0]))
    with_bias = model(*inputs)
    for block in model.multimodal_transformer_blocks:
        for stream in (block.image_transformer_block, block.text_transformer_block):
            stream.attn.k_proj.bias = mx.zeros_like(stream.attn.k_proj.bias)
    assert relative_error(model(*inputs), with_bias) > 1e-3


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_16_bit_model_keeps_timestep_features_exact(dtype):
    features = timestep_features(mx.array([967.0]), 256)
    exact = timestep_features(mx.array([967.0], dtype=mx.float32), 256)
    assert features.dtype == mx.float32 and mx.array_equal(features, exact)
    model = random_model(config_named("tiny"))
    inputs = random_inputs(model.config, 8, 8)
    wanted = model(*inputs, mx.array([967.0, 967.0]))
    model.set_dtype(dtype)
    out = model(*(x.astype(dtype) for x in inputs), mx.array([967.0, 967.0]))
    assert out.dtype == dtype
    assert relative_error(out.astype(mx.float32), wanted) < (0.01 if dtype == mx.float16 else 0.06)


@pytest.mark.parametrize(
    "name, linears, millions",
    [("sd3-medium", 285, 2028), ("sd3.5-medium", 337, 2243), ("sd3.5-large", 453, 8057)],
)
def test_published_sizes(name, linears, millions):
    """Linears of the blocks less the modulation, and parameters without the position grid."""
    names = dict(tree_flatten(MMDiT(config_named(name)).parameters()))
    counted = [
        n for n in names if n.endswith("_proj.weight") or n.endswith(("fc1.weight", "fc2.weight"))
    ]
    assert len([n for n in counted if n.startswith("multimodal")]) == linears
    total = sum(v.size for k, v in names.items() if "pos_embed" not in k)
    assert round(total / 1e6) == millions


@pytest.mark.parametrize("size", [(3, 4), (4, 3), (18, 4), (4, 18), (0, 4)])
def test_impossible_resolution_is_named(size):
    model = MMDiT(config_named("tiny"))
    with pytest.raises(UserError, match=f"{size[0]}x{size[1]}.*multiples of 2 from 2 to 16"):
        model(*random_inputs(model.config, *size), mx.array([1.0, 1.0]))


def test_configs_survive_json_and_name_what_is_wrong():
    for config in CONFIGS.values():
        assert MMDiTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UserError, match="'sd4'.*sd3-medium"):
        config_named("sd4")
    with pytest.raises(UserError, match="'width'.*hidden"):
        MMDiTConfig.from_dict({"depth": 1, "hidden": 8, "heads": 1, "width": 3})
    with pytest.raises(UserError, match="10 is not a multiple of 3"):
        MMDiTConfig(depth=1, hidden=10, heads=3)
    with pytest.raises(UserError, match="depth"):
        MMDiTConfig.from_dict({"hidden": 8, "heads": 1})


def test_gelu_is_mlx_own_forward_and_backward():
    x = mx.concatenate([mx.random.normal((40, 64)) * scale for scale in (1.0, 10.0, 100.0)])
    assert mx.allclose(gelu_of_power(x), nn.gelu_approx(x), rtol=1e-4, atol=1e-6).item()
    wanted = mx.grad(lambda y: (nn.gelu_approx(y) * y).sum())(x)
    got = mx.grad(lambda y: (gelu_of_power(y) * y).sum())(x)
    assert mx.allclose(got, wanted, rtol=1e-4, atol=1e-4).item()
