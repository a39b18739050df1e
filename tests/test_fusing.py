"""Backends that quantize by themselves: layers, and what joins them, against today's path."""

from __future__ import annotations

import dataclasses

from src.backends import named
from src.backends.cuda_int8 import CudaInt8
from src.backends.fusing import Adding, Chaining, Fusing, Normalizing
from src.inference.kernels import TEXT, join, rows_of
from src.models.gelu import gelu_tanh
from src.models.load import load_pipeline
from src.models.mmdit import NORM_EPS, modulate
from src.models.paths import block_linears
from src.quant.artifacts import LayerConfig
from src.quant.fused import read_alike
from src.quant.inject import check_layers, put_in
from src.quant.joined import JoinedFeedForward, JoinedProjections, Norm
from src.quant.linear import QuantizedLinear, Runtime
from src.quant.schedule import Schedule, Step
from src.sampling import guided

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_unflatten

from .fusing_backend import FusingBackend
from .helpers import random_inputs, relative_error
from .quantized_models import SIGMAS as MODEL_SIGMAS
from .quantized_models import grid_of
from .test_inject import LATENT, config_for, rounded_layers

COLUMNS, SIGMAS = 64, (0.9, 0.5, 0.1)
NORM = Norm(modulate, NORM_EPS)
ROUNDING = 2e-6  # of float32 sums that are put together in another order


def grid(columns: int = COLUMNS, shifts: int = 0, smoothing: bool = False, coarse: int = 1, **more):
    rng = np.random.default_rng(columns)
    shift = rng.normal(0, 0.3, (shifts, columns)).astype(np.float32) if shifts else None
    return LayerConfig(
        [8, 6, 8],
        [0.05, 0.1, 0.02],
        shift[0] if shifts == 1 else shift,
        rng.uniform(0.5, 2, columns).astype(np.float32) if smoothing else None,
        coarse=coarse,
        **more,
    )


def layers_of(config, backend, *, a_scale="static", rows=48, columns=COLUMNS, step=None, **more):
    """The same layer over the stand-in and over the reference, at the same step."""
    mx.random.seed(3)
    linear = nn.Linear(columns, rows, bias=more.pop("bias", True))
    step = step or Step(Schedule(SIGMAS))
    return [
        QuantizedLinear.from_linear(
            linear, grid=config, runtime=Runtime(step, a_scale, each), **more
        )
        for each in (backend, named("reference"))
    ]


def test_the_cuda_kernels_and_the_stand_in_are_of_the_protocol():
    for kind in (Chaining, Normalizing, Adding):
        assert isinstance(CudaInt8(), kind) and isinstance(FusingBackend(), kind)
    assert not isinstance(named("dense"), Fusing)
    assert not isinstance(named("metal_int8"), (Chaining, Normalizing, Adding))


@pytest.mark.parametrize("a_scale", ["static", "token"])
@given(
    sigmas=st.sampled_from([0.9, 0.3, (0.9, 0.2), (0.5, 0.5)]),
    shifts=st.sampled_from([0, 1, 3]),
    smoothing=st.booleans(),
    bias=st.booleans(),
    thin=st.booleans(),
    dtype=st.sampled_from([mx.float32, mx.float16]),
    tokens=st.integers(1, 5),
)
def test_a_layer_computes_what_it_does_elsewhere(
    a_scale, sigmas, shifts, smoothing, bias, thin, dtype, tokens
):
    """Also batches of several steps, with shifts and so biases of their own."""
    backend, step = FusingBackend(), Step(Schedule(SIGMAS))
    step.set_sigma(mx.array(sigmas))
    parts = tuple(0.1 * mx.random.normal(s, key=mx.random.key(1)) for s in ((2, 64), (48, 2)))
    fused, plain = layers_of(
        grid(shifts=shifts, smoothing=smoothing), backend, a_scale=a_scale, step=step, bias=bias,
        low_rank=parts if thin else None,
    )  # fmt: skip
    assert fused.fuses and not plain.fuses
    x = mx.random.normal((2, tokens, COLUMNS), key=mx.random.key(tokens)).astype(dtype)
    got, wanted = fused(x), plain(x)
    assert backend.quantized == 1 and got.dtype == dtype
    tolerance = ROUNDING if dtype == mx.float32 else 2**-10
    np.testing.assert_allclose(got, wanted, atol=tolerance * float(mx.abs(wanted).max()))
    np.testing.assert_allclose(
        fused(x[0, 0]) if len(step.place) == 1 else got[0, 0],
        plain(x[0, 0]) if len(step.place) == 1 else wanted[0, 0],
        atol=tolerance * float(mx.abs(wanted).max()),
    )


def test_empty_inputs_and_nan():
    backend = FusingBackend()
    fused, plain = layers_of(grid(), backend)
    assert fused(mx.zeros((2, 0, COLUMNS), dtype=mx.float16)).shape == (2, 0, 48)
    x = mx.ones((1, 3, COLUMNS))
    x[0, 1, 5] = mx.nan
    assert np.isnan(fused(x)[0, 1]).all() and not np.isnan(fused(x)[0, ::2]).any()
    assert backend.quantized == 2 and mx.array_equal(fused(x), plain(x), equal_nan=True)


def test_what_a_backend_does_not_fuse_goes_the_usual_way():
    for config, runtime, bits in (
        (grid(coarse=4), {}, {}),  # codes of two regions
        (grid(), {"weights_only": True}, {}),
        (grid(), {}, {"group_size": 32}),
        (None, {}, {}),
    ):
        backend = FusingBackend()
        linear, step = nn.Linear(COLUMNS, 48), Step(Schedule(SIGMAS))
        fused, plain = (
            QuantizedLinear.from_linear(
                linear, grid=config, runtime=Runtime(step, backend=each, **runtime), **bits
            )
            for each in (backend, named("reference"))
        )
        x = mx.random.normal((2, 5, COLUMNS))
        assert not fused.fuses and backend.quantized == 0
        assert mx.array_equal(fused(x), plain(x))


def test_a_layer_that_is_asked_for_other_codes_stops_to_fuse():
    """As a wrapper does that quantizes changes of the input by itself."""
    fused, _ = layers_of(grid(), FusingBackend(), step=Step(Schedule(SIGMAS)))
    fused.expect(None)
    assert not fused.fuses
    y = fused.multiply(mx.ones((2, COLUMNS)), None)
    assert y.shape == (2, 48)


def attention_of(configs, backend, step, *, output: bool = True) -> nn.Module:
    module = nn.Module()
    for index, (name, config) in enumerate(
        zip(("q_proj", "k_proj", "v_proj"), configs, strict=True)
    ):
        mx.random.seed(index)
        runtime = Runtime(step, backend=backend)
        module[name] = QuantizedLinear.from_linear(
            nn.Linear(COLUMNS, 48, bias=name != "k_proj"), grid=config, runtime=runtime
        )
    if output:
        module.o_proj = nn.Linear(48, COLUMNS)
    return module


def test_q_k_and_v_share_one_quantization():
    backend, step = FusingBackend(), Step(Schedule(SIGMAS))
    joined = JoinedProjections(attention_of([grid(smoothing=True)] * 3, backend, step), NORM)
    x = mx.random.normal((2, 7, COLUMNS))
    alone = [layer(x) for layer in (joined.q_proj, joined.k_proj, joined.v_proj)]
    assert backend.quantized == 3
    for got, wanted in zip(joined.project(x), alone, strict=True):
        assert mx.array_equal(got, wanted)
    assert backend.quantized == 4
    names = {name for name, _ in joined.named_modules()}
    assert names == {"", "q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    "change",
    [
        {"scale": [0.05, 0.1, 0.021]},
        {"bits": [8, 8, 8]},
        {"shift": np.full(COLUMNS, 0.1, np.float32)},
        {"smoothing": np.full(COLUMNS, 2.0, np.float32)},
    ],
)
def test_layers_with_other_grids_share_nothing(change):
    backend, step = FusingBackend(), Step(Schedule(SIGMAS))
    configs = [grid(), grid(), dataclasses.replace(grid(), **change)]
    joined = JoinedProjections(attention_of(configs, backend, step), NORM)
    assert read_alike([joined.q_proj, joined.k_proj])
    assert not read_alike([joined.q_proj, joined.v_proj])
    x = mx.random.normal((2, 7, COLUMNS))
    for got, layer in zip(
        joined.project(x), (joined.q_proj, joined.k_proj, joined.v_proj), strict=True
    ):
        assert mx.array_equal(got, layer(x))


def test_layers_of_two_models_or_a_plain_one_share_nothing():
    backend = FusingBackend()
    one, other = (layers_of(grid(), backend, step=Step(Schedule(SIGMAS)))[0] for _ in range(2))
    assert not read_alike([one, other])  # each follows a step of its own
    step = Step(Schedule(SIGMAS))
    joined = JoinedProjections(attention_of([grid()] * 3, backend, step), NORM)
    joined.k_proj = nn.Linear(COLUMNS, 48)
    before, x = backend.quantized, mx.random.normal((2, 7, COLUMNS))
    q, k, v = joined.project(x)
    assert backend.quantized == before + 2 and mx.array_equal(k, joined.k_proj(x))


@pytest.mark.parametrize("shifts", [0, 3])
def test_q_k_and_v_are_one_product_where_the_backend_can(shifts):
    backend, step = FusingBackend(merges=True), Step(Schedule(SIGMAS))
    attention = attention_of([grid(shifts=shifts)] * 3, backend, step)
    joined, x = JoinedProjections(attention, NORM), mx.random.normal((2, 7, COLUMNS))
    layers = joined.q_proj, joined.k_proj, joined.v_proj
    for sigma in (0.9, 0.6, 0.1):
        step.set_sigma(mx.array([sigma]))
        before, got = backend.multiplied, joined.project(x)
        assert backend.multiplied == before + 1
        assert mx.array_equal(got, mx.concatenate([layer(x) for layer in layers], axis=-1))
    step.set_sigma(mx.array([0.9, 0.1]))
    got = joined.project(x)
    assert isinstance(got, tuple) == (shifts > 1)  # rows of the batch with biases of their own
    for part, layer in zip(mx.split(got, 3, axis=-1) if shifts < 2 else got, layers, strict=True):
        assert mx.array_equal(part, layer(x))


def test_what_is_joined_may_be_joined_again():
    backend, step = FusingBackend(merges=True), Step(Schedule(SIGMAS))
    joined = JoinedProjections(attention_of([grid()] * 3, backend, step), NORM)
    other, x = FusingBackend(), mx.random.normal((2, 7, COLUMNS))
    for layer in (joined.q_proj, joined.k_proj, joined.v_proj):
        layer.prepare(dataclasses.replace(layer.runtime, backend=other), mx.float32)
    again = JoinedProjections(joined, NORM)
    assert set(again.children()) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for got, layer in zip(
        again.project(x), (again.q_proj, again.k_proj, again.v_proj), strict=True
    ):
        assert mx.array_equal(got, layer(x))


def test_what_was_merged_ends_with_another_layer_or_another_kernel():
    for change in (
        lambda joined, other: setattr(joined, "k_proj", other),
        lambda joined, other: joined.v_proj.prepare(joined.v_proj.runtime, mx.float32),
    ):
        backend, step = FusingBackend(merges=True), Step(Schedule(SIGMAS))
        one, other = (attention_of([grid()] * 3, backend, step) for _ in range(2))
        joined, x = JoinedProjections(one, NORM), mx.random.normal((2, 7, COLUMNS))
        assert isinstance(joined.project(x), mx.array)
        change(joined, other.v_proj)
        layers = joined.q_proj, joined.k_proj, joined.v_proj
        for got, layer in zip(joined.project(x), layers, strict=True):
            assert mx.array_equal(got, layer(x))


def feed_forward(backend, step, *, shifts=1, smoothing=False, coarse=1, a_scale="static", low=None):
    def quantized(columns, rows, config, low_rank=None):
        mx.random.seed(rows)
        runtime = Runtime(step, a_scale, backend)
        linear = nn.Linear(columns, rows)
        return QuantizedLinear.from_linear(linear, grid=config, runtime=runtime, low_rank=low_rank)

    hidden = dataclasses.replace(grid(96, shifts, smoothing, coarse), scale=[0.02, 0.04, 0.01])
    fc1, fc2 = quantized(COLUMNS, 96, grid()), quantized(96, COLUMNS, hidden, low)
    return JoinedFeedForward(fc1, fc2, gelu_tanh, NORM)


@pytest.mark.parametrize("shifts", [0, 1, 3])
@pytest.mark.parametrize("smoothing", [False, True])
def test_an_mlp_runs_as_one_chain(shifts, smoothing):
    backend, step = FusingBackend(), Step(Schedule(SIGMAS))
    mlp = feed_forward(backend, step, shifts=shifts, smoothing=smoothing)
    x = mx.random.normal((2, 7, COLUMNS))
    for sigma in (0.9, 0.6, 0.1):
        step.set_sigma(mx.array([sigma]))
        quantized, got = backend.quantized, mlp(x)
        assert backend.quantized == quantized + 1
        # Where a value lies halfway between two codes, either is right.
        assert relative_error(got, mlp.fc2(gelu_tanh(mlp.fc1(x)))) < 2e-3
    assert backend.chained == 3 and got.shape == x.shape


def test_an_mlp_that_cannot_be_chained_runs_layer_by_layer():
    thin = tuple(mx.zeros(s) for s in ((2, 96), (COLUMNS, 2)))
    x = mx.random.normal((2, 7, COLUMNS))
    for how in ({"coarse": 4}, {"a_scale": "token"}, {"low": thin}, {}):
        backend, step = FusingBackend(), Step(Schedule(SIGMAS))
        mlp = feed_forward(backend, step, **how)
        if not how:  # rows of a batch at two steps: one grid would be wrong for one of them
            step.set_sigma(mx.array([0.9, 0.1]))
        assert mx.array_equal(mlp(x), mlp.fc2(gelu_tanh(mlp.fc1(x))))
        assert backend.chained == 0
    mlp.fc2 = nn.Linear(96, COLUMNS)
    assert mx.array_equal(mlp(x), mlp.fc2(gelu_tanh(mlp.fc1(x))))
    assert mlp(x[:, :0]).shape == (2, 0, COLUMNS)


# --- the layer norm before, the gate and the residual behind


def modulation_of(columns: int, entries: int, dtype=mx.float32) -> list[mx.array]:
    """Shift, scale and gate, parts of one array as the model has them."""
    parts = mx.random.normal((entries, 3 * columns), key=mx.random.key(8)) * 0.5
    return mx.split(parts.astype(dtype), 3, axis=1)


def outputs_of(joined, x, attended, shift, scale, gate) -> list[mx.array]:
    return [*joined.project_modulated(x, shift, scale), joined.add_output(x, attended, gate)]


def attention_with_output(backend, step, **how) -> JoinedProjections:
    attention = attention_of([grid(**how)] * 3, backend, step)
    attention.o_proj = QuantizedLinear.from_linear(
        nn.Linear(COLUMNS, COLUMNS), grid=grid(), runtime=Runtime(step, backend=backend)
    )
    return JoinedProjections(attention, NORM)


@given(
    tokens=st.integers(1, 9),
    entries=st.sampled_from([1, 2]),
    sigmas=st.sampled_from([0.9, (0.9, 0.3)]),
    shifts=st.sampled_from([0, 1, 3]),
    smoothing=st.booleans(),
)
def test_an_attention_begins_with_its_norm_and_ends_with_its_residual(
    tokens, entries, sigmas, shifts, smoothing
):
    """Also with rows of a batch at steps of their own, which have grids of their own."""
    mx.random.seed(tokens)
    backend, step = FusingBackend(), Step(Schedule(SIGMAS))
    joined = attention_with_output(backend, step, shifts=shifts, smoothing=smoothing)
    step.set_sigma(mx.array(sigmas))
    x, attended = mx.random.normal((2, tokens, COLUMNS)), mx.random.normal((2, tokens, COLUMNS))
    shift, scale, gate = modulation_of(COLUMNS, entries)
    got = outputs_of(joined, x, attended, shift, scale, gate)
    assert backend.normalized == backend.added == 1 and backend.quantized == 2
    modulated = modulate(x, shift, scale)
    wanted = [layer(modulated) for layer in (joined.q_proj, joined.k_proj, joined.v_proj)]
    wanted.append(x + joined.o_proj(attended) * gate[:, None])
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        # Where a value lies halfway between two codes, either is right.
        assert relative_error(one, other) < 5e-3
    assert relative_error(got[-1], wanted[-1]) < ROUNDING


def test_sixteen_bits_are_rounded_once():
    backend, step = FusingBackend(), Step(Schedule(SIGMAS))
    joined = attention_with_output(backend, step)
    x = mx.random.normal((2, 7, COLUMNS), key=mx.random.key(4)).astype(mx.float16)
    attended = mx.random.normal((2, 7, COLUMNS), key=mx.random.key(5)).astype(mx.float16)
    gate = modulation_of(COLUMNS, 2, mx.float16)[2]
    got = joined.add_output(x, attended, gate)
    assert got.dtype == mx.float16 and backend.added == 1
    y = joined.o_proj(attended.astype(mx.float32))
    exact = (
        np.array(x).astype(np.float64) + np.array(y) * np.array(gate).astype(np.float64)[:, None]
    )
    np.testing.assert_allclose(got, exact, rtol=2**-11, atol=1e-6)


def test_what_cannot_be_put_together_is_done_one_after_the_other():
    """Other grids, a low-rank branch, vectors of another dtype, a plain layer, no tokens."""
    x, attended = mx.random.normal((2, 7, COLUMNS)), mx.random.normal((2, 7, COLUMNS))
    vectors = modulation_of(COLUMNS, 2)

    def compare(joined, backend, normalized: int, added: int) -> None:
        backend.normalized = backend.added = 0
        got = outputs_of(joined, x, attended, *vectors)
        assert (backend.normalized, backend.added) == (normalized, added)
        modulated = modulate(x, *vectors[:2])
        for layer, one in zip((joined.q_proj, joined.k_proj, joined.v_proj), got, strict=False):
            assert relative_error(one, layer(modulated)) < 5e-3
        wanted = x + joined.o_proj(attended) * vectors[2][:, None]
        assert relative_error(got[-1], wanted) < ROUNDING

    backend, step = FusingBackend(), Step(Schedule(SIGMAS))
    joined = attention_with_output(backend, step)
    compare(joined, backend, 1, 1)
    thin = tuple(0.1 * mx.random.normal(s, key=mx.random.key(1)) for s in ((2, 64), (48, 2)))
    low = QuantizedLinear.from_linear(
        nn.Linear(COLUMNS, 48), grid=grid(), low_rank=thin, runtime=Runtime(step, backend=backend)
    )
    q_proj, joined.q_proj = joined.q_proj, low
    compare(joined, backend, 0, 1)
    joined.q_proj, joined.o_proj = q_proj, nn.Linear(COLUMNS, COLUMNS)
    compare(joined, backend, 1, 0)
    joined.k_proj = nn.Linear(COLUMNS, 48)
    compare(joined, backend, 0, 0)
    joined = attention_with_output(backend, step)
    backend.normalized = backend.added = 0
    half = [v.astype(mx.float16) for v in vectors]
    outputs_of(joined, x, attended, *half)
    assert backend.normalized == backend.added == 0
    empty = outputs_of(joined, x[:, :0], attended[:, :0], *vectors)
    assert [y.shape for y in empty] == [*[(2, 0, 48)] * 3, (2, 0, COLUMNS)]


def test_biases_of_several_steps_are_added_before_the_gate():
    backend, step = FusingBackend(), Step(Schedule(SIGMAS))
    mlp = feed_forward(backend, step, shifts=3)
    x, (shift, scale, gate) = mx.random.normal((2, 7, COLUMNS)), modulation_of(COLUMNS, 2)
    for sigmas, chained, added in (((0.9, 0.1), 0, 0), (0.5, 1, 1)):
        step.set_sigma(mx.array(sigmas))
        backend.normalized = backend.chained = backend.added = 0
        got = mlp.add_modulated(x, shift, scale, gate)
        assert (backend.normalized, backend.chained, backend.added) == (1, chained, added)
        wanted = x + mlp.fc2(gelu_tanh(mlp.fc1(modulate(x, shift, scale)))) * gate[:, None]
        assert relative_error(got, wanted) < 5e-3


@pytest.mark.parametrize("how", [{"a_scale": "token"}, {"coarse": 4}, {}])
def test_an_mlp_takes_what_it_can(how):
    backend, step = FusingBackend(), Step(Schedule(SIGMAS))
    mlp = feed_forward(backend, step, **how)
    x, (shift, scale, gate) = mx.random.normal((2, 7, COLUMNS)), modulation_of(COLUMNS, 2)
    got = mlp.add_modulated(x, shift, scale, gate)
    wanted = x + mlp.fc2(gelu_tanh(mlp.fc1(modulate(x, shift, scale)))) * gate[:, None]
    assert relative_error(got, wanted) < 5e-3
    assert backend.normalized == 1 and backend.chained == (not how)
    assert backend.added == ("coarse" not in how)
    assert mlp.add_modulated(x[:, :0], shift, scale, gate).shape == (2, 0, COLUMNS)


# --- whole models


def joined_model(model: str, backend, **how):
    """With every linear over the backend, joined."""
    pipeline = load_pipeline(model)
    step, layers = Step(Schedule(MODEL_SIGMAS)), []
    for path, linear in block_linears(pipeline.transformer).items():
        # q, k and v have the same input, and so the same grid.
        config = grid_of(path, linear.weight.shape[1], **how)
        runtime = Runtime(step, backend=backend)
        layers.append((path, QuantizedLinear.from_linear(linear, grid=config, runtime=runtime)))
    pipeline.transformer.update_modules(tree_unflatten(layers))
    pipeline.transformer.follow(step)
    return pipeline, join(pipeline.transformer)


HOW = {"smoothing": True, "shifts": 1, "coarse": 1}


def velocity(pipeline, sigma, height: int = 8, width: int = 8) -> mx.array:
    latent, text, pooled = random_inputs(pipeline.transformer.config, height, width)
    text, pooled = (mx.concatenate([v, v]) for v in (text, pooled))
    return guided(pipeline.transformer, latent, mx.array(sigma), text, pooled, 4.0)


@pytest.mark.parametrize("model", ["tiny", "tiny-3.5-medium"])
def test_q_k_and_v_as_one_product_change_no_bit(model):
    alone, together = FusingBackend(), FusingBackend(merges=True)
    pipelines = [joined_model(model, backend, **HOW)[0] for backend in (alone, together)]
    one, other = (velocity(pipeline, 0.5) for pipeline in pipelines)
    assert mx.array_equal(one, other)
    config = pipelines[0].transformer.config
    attentions = 2 * config.depth + config.dual_attention_blocks
    assert together.multiplied == alone.multiplied - 2 * attentions
    compiled = mx.compile(lambda: velocity(pipelines[1], 0.5), inputs=pipelines[1].transformer)
    assert relative_error(compiled(), other) < 1e-3


@pytest.mark.parametrize("model", ["tiny", "tiny-3.5-medium"])
def test_a_joined_model_draws_what_it_did(model):
    backend = FusingBackend()
    fused, parts = joined_model(model, backend, **HOW)
    plain, none = joined_model(model, named("reference"), **HOW)
    assert none and not any(path.endswith("mlp") for path in none)
    depth = fused.transformer.config.depth
    dual = fused.transformer.config.dual_attention_blocks
    assert len(parts) == 2 * depth + dual + 2 * depth - 1  # the last text block has no MLP
    paths = {p for p, m in plain.transformer.named_modules() if isinstance(m, QuantizedLinear)}
    assert paths == {
        p for p, m in fused.transformer.named_modules() if isinstance(m, QuantizedLinear)
    }
    assert relative_error(velocity(fused, 0.5), velocity(plain, 0.5)) < 0.02
    # One input each of q, k, v, of o_proj, and of fc1; fc2's codes come out of fc1.
    o_projs = sum(p.endswith("o_proj") for p in paths)
    assert backend.quantized == 2 * depth + dual + o_projs + 2 * depth - 1
    assert backend.chained == 2 * depth - 1
    # Each attention and MLP begins with its norm, each o_proj and fc2 ends with the residual.
    assert backend.normalized == 2 * depth + dual + 2 * depth - 1
    assert backend.added == o_projs + 2 * depth - 1
    odd = [velocity(pipeline, 0.5, 6, 10) for pipeline in (fused, plain)]  # 15 tokens
    assert relative_error(*odd) < 0.02


def test_batches_of_several_steps_are_told_apart():
    """Each row as if it were alone, though the MLPs are not chained then."""
    backend = FusingBackend()
    pipeline, _ = joined_model("tiny", backend, **{**HOW, "shifts": len(MODEL_SIGMAS)})
    inputs = random_inputs(pipeline.transformer.config, 8, 8)
    sigmas = mx.array([MODEL_SIGMAS[1], MODEL_SIGMAS[8]])
    together = pipeline.transformer(*inputs, 1000 * sigmas)
    assert backend.chained == 0
    for row in range(2):
        alone = pipeline.transformer(
            *(x[row : row + 1] for x in inputs), 1000 * sigmas[row : row + 1]
        )
        assert relative_error(together[row], alone[0]) < 0.02
    assert backend.chained > 0


@pytest.mark.slow
def test_a_compiled_step_shares_too():
    backend = FusingBackend()
    pipeline, _ = joined_model("tiny", backend, **HOW)
    conditioning = pipeline.condition(["a large red star in the center on a night background"], 4.0)
    eager, compiled = (
        pipeline.velocity(conditioning, 4.0, compiled=wanted) for wanted in (False, True)
    )
    latent = mx.random.normal(LATENT, key=mx.random.key(0))
    for sigma in (1.0, 0.4):
        wanted = eager(latent, mx.array(sigma))
        before = backend.quantized
        assert relative_error(compiled(latent, mx.array(sigma)), wanted) < 0.02
        # Where it is traced: q, k and v of four streams, and o_proj and fc1 of three.
        assert backend.quantized - before in (0, 4 + 3 + 3)


def test_sixteen_bit_layers_may_come_back_under_what_joins_them():
    backend = FusingBackend()
    pipeline, exact = load_pipeline("tiny"), load_pipeline("tiny")
    layers = rounded_layers(pipeline)
    model = pipeline.transformer
    linears = block_linears(model)
    put_in(model, check_layers(model, layers, config=config_for(layers)), backend=backend)
    assert len(join(model)) == 7
    assert relative_error(velocity(pipeline, 0.5), velocity(exact, 0.5)) > 1e-3
    model.update_modules(tree_unflatten(list(linears.items())))
    before = backend.quantized
    assert mx.array_equal(velocity(pipeline, 0.5), velocity(exact, 0.5))
    assert backend.quantized == before


def test_an_exact_gelu_is_not_taken_for_its_tanh_form():
    pipeline = load_pipeline("tiny")
    config = dataclasses.replace(pipeline.transformer.config, gelu="exact")
    model, step = type(pipeline.transformer)(config), Step(Schedule(MODEL_SIGMAS))
    backend, layers = FusingBackend(), []
    for path, linear in block_linears(model).items():
        given = grid_of(path, linear.weight.shape[1], **HOW)
        runtime = Runtime(step, backend=backend)
        layers.append((path, QuantizedLinear.from_linear(linear, grid=given, runtime=runtime)))
    model.update_modules(tree_unflatten(layers))
    assert not any(path.endswith("mlp") for path in join(model))


def test_each_stream_gets_the_kernel_for_its_own_tokens():
    pipeline = load_pipeline("tiny")
    layers = rounded_layers(pipeline)
    rows = rows_of(pipeline.transformer.config, pipeline.defaults)
    put_in(
        pipeline.transformer,
        check_layers(pipeline.transformer, layers, config=config_for(layers)),
        rows=rows,
    )
    height, width, _ = pipeline.latent_shape(pipeline.defaults.height, pipeline.defaults.width)
    patch = pipeline.transformer.config.patch
    for path, layer in pipeline.transformer.named_modules():
        if isinstance(layer, QuantizedLinear):
            tokens = 154 if TEXT in path else height * width // patch**2
            assert layer.runtime.rows == 2 * tokens, path
