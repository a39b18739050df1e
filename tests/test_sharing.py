"""q, k and v that read one input share its codes, whatever multiplies; nothing else changes."""

from __future__ import annotations

from src.backends import named
from src.inference.int8 import Int8, open_with_int8
from src.inference.kernels import join
from src.inference.streaming import streamed
from src.models.load import load_pipeline
from src.models.paths import block_linears
from src.quant.artifacts import LayerConfig
from src.quant.fused import read_alike
from src.quant.int8 import INT8Linear
from src.quant.joined import JoinedProjections
from src.quant.linear import QuantizedLinear, Runtime
from src.quant.schedule import Schedule, Step

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from .helpers import random_inputs

SIGMAS = (1.0, 0.5)


def layer(scale: float = 0.05, backend: str = "dense", step: Step | None = None, **grid):
    config = LayerConfig([8, 6], [scale, 2 * scale], **grid)
    runtime = Runtime(step, backend=named(backend))
    return QuantizedLinear.from_linear(nn.Linear(64, 32), grid=config, runtime=runtime)


def test_layers_read_alike_only_with_one_grid_one_step_and_one_way_to_codes():
    step = Step(Schedule(SIGMAS))
    assert read_alike([layer(step=step), layer(step=step), layer(backend="reference", step=step)])
    for other in (
        layer(scale=0.06, step=step),
        layer(step=Step(Schedule(SIGMAS))),
        layer(step=step, shift=np.ones(64)),
        layer(step=step, smoothing=np.full(64, 2.0)),
        layer(step=step, coarse=4, coarse_sides=1),
        QuantizedLinear.from_linear(nn.Linear(64, 32)),  # its input stays in floats
        INT8Linear.from_linear(nn.Linear(64, 32)),
        nn.Linear(64, 32),
    ):
        assert not read_alike([layer(step=step), other])


def transformer_on_codes(backend: str, a_scale: str, thin: bool):
    """tiny's, with shifted inputs, and with a low-rank branch or without."""
    transformer, step, layers = load_pipeline("tiny").transformer, Step(Schedule(SIGMAS)), []
    for path, linear in block_linears(transformer).items():
        columns = linear.weight.shape[1]
        config = LayerConfig([8, 6], [0.02, 0.03], np.linspace(-0.1, 0.1, columns))
        branch = (mx.full((2, columns), 0.01), mx.full((len(linear.weight), 2), 0.01))
        made = QuantizedLinear.from_linear(
            linear,
            grid=config,
            low_rank=branch if thin else None,
            runtime=Runtime(step, a_scale, named(backend)),
        )
        layers.append((path, made))
    transformer.update_modules(tree_unflatten(layers))
    transformer.follow(step)
    return transformer


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("a_scale", ["static", "token"])
@pytest.mark.parametrize("backend", ["dense", "reference", "quantized_matmul"])
def test_a_joined_model_gives_the_same_bits(backend, a_scale, thin):
    transformer = transformer_on_codes(backend, a_scale, thin)
    inputs = (*random_inputs(transformer.config, 8, 8), mx.array([700.0]))
    alone = transformer(*inputs)
    joined = join(transformer)
    attentions = [m for _, m in transformer.named_modules() if isinstance(m, JoinedProjections)]
    assert len(joined) == len(attentions) == 2 * transformer.config.depth
    assert all(read_alike((a.q_proj, a.k_proj, a.v_proj)) for a in attentions)
    assert mx.array_equal(transformer(*inputs), alone)


def test_an_int8_pipeline_shares_codes_and_gives_its_layers_outputs():
    pipeline = open_with_int8("nano", int8=Int8(use_int8=True), tell=lambda line: None)
    attention = pipeline.transformer.multimodal_transformer_blocks[0].image_transformer_block.attn
    x = mx.random.normal((2, 5, attention.q_proj.weight.shape[1]))
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    assert read_alike(layers)
    for shared, own in zip(attention.project(x), (layer(x) for layer in layers), strict=True):
        assert mx.array_equal(shared, own)


def test_blocks_that_come_and_go_keep_what_was_prepared():
    pipeline = open_with_int8("nano", int8=Int8(use_int8=True), tell=lambda line: None)
    layers = [m for _, m in pipeline.transformer.named_modules() if isinstance(m, INT8Linear)]
    assert layers and all(layer.shares for layer in layers)
    with streamed(pipeline, 1):
        assert all(layer.shares for layer in layers)
    assert all(layer.shares for layer in layers)


def test_another_weight_or_bias_ends_what_was_prepared():
    linear = INT8Linear.from_linear(nn.Linear(64, 32, bias=False))
    for change in (
        lambda: linear.update({"weight": INT8Linear.from_linear(nn.Linear(64, 32)).weight}),
        lambda: setattr(linear, "bias", mx.ones(32)),
        lambda: delattr(linear, "bias"),
    ):
        linear.prepare_for(128, mx.float32)
        assert linear.shares
        change()
        assert not linear.shares


def test_an_empty_int8_layer_has_no_codes_to_share():
    shell = INT8Linear.shell(32, 64)
    shell.prepare_for(128, mx.float16)
    assert not shell.shares and not read_alike([shell, shell])
