"""Layers that quantize changes: the recursion, what it remembers, and how a whole model runs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

from src import cli
from src.errors import UserError
from src.inference.residual_measures import gains_of
from src.inference.residual_setup import apply, prepare
from src.inference.residuals import (
    Options,
    Work,
    cache_bytes,
    largest_work,
    layers_of,
    refuse,
    unwrap,
    within,
    wrapped,
)
from src.models.load import load_pipeline
from src.models.paths import block_linears
from src.models.pipeline import Conditioning, TextEncoder
from src.quant.artifacts import LayerConfig
from src.quant.int8 import INT8Linear
from src.quant.linear import QuantizedLinear, Runtime
from src.quant.modulated import (
    Memory,
    ModulatedConv2d,
    ModulatedLinear,
    modulated,
    set_quant_state,
)
from src.quant.residual_scales import (
    DYNAMIC,
    KINDS,
    Dynamic,
    Search,
    Static,
    Told,
    best_scale,
    histogram,
    width,
)
from src.quant.schedule import Schedule, Step
from src.sampling import Noise, combined, denoise, guided
from src.store import human_bytes

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

from .helpers import relative_error
from .quantized_models import SIGMAS, quantized_pipeline

MANY = 40  # steps, between which little changes
PROMPT = "a large red star in the center on a night background"


class Exactly:
    """A quantizer that rounds nothing away."""

    largest = None

    def __call__(self, x: mx.array, first: bool) -> Told:
        return Told(x, mx.array(1.0))


def walk(seed: int, steps: int, shape: tuple[int, ...] = (2, 5, 32)) -> list[mx.array]:
    """An input that changes little from step to step."""
    rng = np.random.default_rng(seed)
    moves = (
        rng.standard_normal((steps, *shape))
        * np.geomspace(1, 0.05, steps)[(...,) + (None,) * len(shape)]
    )
    return [mx.array(x.astype(np.float32)) for x in np.cumsum(moves, axis=0)]


def linear(seed: int = 0, rows: int = 16, columns: int = 32) -> nn.Linear:
    rng = np.random.default_rng(seed)
    layer = nn.Linear(columns, rows)
    layer.weight = mx.array(rng.standard_normal((rows, columns)).astype(np.float32))
    layer.bias = mx.array(rng.standard_normal(rows).astype(np.float32))
    return layer


def grid(columns: int = 32, shifts: int = 1, smoothing: bool = True) -> LayerConfig:
    rng = np.random.default_rng(columns)
    shift = rng.normal(0, 0.3, (shifts, columns)).astype(np.float32)
    return LayerConfig(
        [8] * len(SIGMAS),
        [0.05] * len(SIGMAS),
        shift=shift[0] if shifts == 1 else shift,
        smoothing=rng.uniform(0.5, 2, columns).astype(np.float32) if smoothing else None,
    )


def quantized_linear(step: Step, bits: int = 4, **of_grid) -> QuantizedLinear:
    runtime = Runtime(step, weights_only=True)
    return QuantizedLinear.from_linear(linear(), bits=bits, grid=grid(**of_grid), runtime=runtime)


def outputs(layer: ModulatedLinear, inputs: list[mx.array]) -> list[np.ndarray]:
    layer.reset_cache()
    return [np.array(layer(x)) for x in inputs]


def recursion(inputs, weight, bias, bits: int, per: str) -> list[np.ndarray]:
    """The paper's own, in NumPy and float64, with scales from the largest values."""
    axes = {"tensor": (1, 2), "token": (2,), "range": (2,), "guidance": (2,), "channel": (1,)}[per]
    told, output, found = None, None, []
    for x in inputs:
        change = np.array(x, np.float64) - (0 if told is None else told)
        limit = 2 ** ((8 if told is None else bits) - 1) - 1
        low, high = (f(change, axis=axes, keepdims=True) for f in (np.min, np.max))
        middle = (low + high) / 2 if per in ("range", "guidance") else 0
        change = change - middle
        scale = np.maximum(np.abs(change).max(axis=axes, keepdims=True) / limit, 1e-12)
        change = np.clip(np.round(change / scale), -limit, limit) * scale + middle
        told = change if told is None else told + change
        output = change @ weight.T + (bias if output is None else output)
        found.append(output)
    return found


@pytest.mark.parametrize("per", DYNAMIC)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_it_is_the_published_recursion(bits, per):
    plain, inputs = linear(), walk(0, 6)
    got = outputs(ModulatedLinear(plain, Dynamic(bits, per)), inputs)
    weight, bias = (np.array(plain[name], np.float64) for name in ("weight", "bias"))
    for one, wanted in zip(got, recursion(inputs, weight, bias, bits, per), strict=True):
        # A value halfway between two codes may go either way: float32 here, float64 there.
        assert relative_error(one, wanted) < (1e-5 if bits == 8 else 0.02)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    bits=st.integers(2, 8),
    per=st.sampled_from(DYNAMIC),
    steps=st.integers(1, 8),
    guided=st.booleans(),
)
def test_what_is_kept_is_a_matched_pair(seed, bits, per, steps, guided):
    """ô = W·â + b at every step, whatever was rounded away on the way."""
    layer, memory = linear(seed), Memory()
    wrapper = ModulatedLinear(layer, Dynamic(bits, per), memory=memory)
    memory.reset(guided)
    for x in walk(seed, steps):
        y = wrapper(x)
        told, output = memory.arrays[""]
        assert output.dtype == mx.float32
        np.testing.assert_allclose(np.array(output), np.array(layer(told)), atol=1e-4)
        np.testing.assert_array_equal(np.array(y), np.array(output))


@pytest.mark.parametrize("shifts", [1, len(SIGMAS)])
@pytest.mark.parametrize("smoothing", [False, True])
def test_changes_that_are_not_rounded_give_the_layer_itself(shifts, smoothing):
    """Also where shift and bias are other ones at every step."""
    step = Step(Schedule(SIGMAS))
    layer = quantized_linear(step, shifts=shifts, smoothing=smoothing)
    inputs = walk(1, len(SIGMAS))
    wrapper = ModulatedLinear(layer, Exactly())
    wrapper.reset_cache()
    for sigma, x in zip(SIGMAS, inputs, strict=True):
        step.set_sigma(sigma)
        assert relative_error(wrapper(x), layer(x)) < 1e-5


def test_sixteen_bit_weights_see_the_same_input():
    """In the place of quantized ones, under their shift and smoothing."""
    step = Step(Schedule(SIGMAS))
    for shifts in (1, len(SIGMAS)):
        layer = quantized_linear(step, shifts=shifts)
        wrapper = ModulatedLinear(layer, Exactly(), exact=linear())
        wrapper.switch(weights=False)
        wrapper.reset_cache()
        for sigma, x in zip(SIGMAS, walk(2, len(SIGMAS)), strict=True):
            step.set_sigma(sigma)
            assert relative_error(wrapper(x), linear()(x)) < 1e-5


def test_sixteen_bit_weights_are_computed_before_a_step_is_traced():
    """They are no part of the model's tree, and a compiled step would compute them anew."""
    exact, graph = linear(), io.StringIO()
    exact.weight = mx.sinh(exact.weight)
    wrapper = ModulatedLinear(linear(), Dynamic(8, "tensor"), exact=exact)
    wrapper.switch(weights=False)
    wrapper.reset_cache()
    mx.export_to_dot(graph, wrapper(mx.zeros((1, 5, 32))))
    assert "Divide" in graph.getvalue() and "Sinh" not in graph.getvalue()


def test_errors_do_not_add_up():
    """Where plain layers err by their grid at every step, later changes undo what was lost."""
    inputs = walk(3, 40)
    exact = [np.array(linear()(x)) for x in inputs]
    modulating = outputs(ModulatedLinear(linear(), Dynamic(4, "tensor")), inputs)
    plain = ModulatedLinear(linear(), None, values=Dynamic(4, "tensor", 4))
    last = relative_error(modulating[-1], exact[-1])
    assert last < 0.1 * relative_error(np.array(plain(inputs[-1])), exact[-1])
    still = outputs(ModulatedLinear(linear(), Dynamic(4, "tensor")), [inputs[0]] * 12)
    assert relative_error(still[-1], exact[0]) < 1e-5


def layers_to_wrap():
    convolution = nn.Conv2d(8, 6, 3, padding=1)
    packed = nn.QuantizedLinear.from_linear(linear(columns=64), group_size=32)
    tokens, pixels = (2, 5, 64), (2, 6, 6, 8)
    return {
        "linear": (linear(columns=64), tokens),
        "no bias": (nn.Linear(64, 16, bias=False), tokens),
        "MLX's own packed one": (packed, tokens),
        "INT8": (INT8Linear.from_linear(linear(columns=64)), tokens),
        "INT8 in blocks": (INT8Linear.from_linear(linear(columns=64), block_size=32), tokens),
        "convolution": (convolution, pixels),
    }


@pytest.mark.parametrize("per", ["token", "range"])
@pytest.mark.parametrize("name", list(layers_to_wrap()))
def test_any_layer_can_be_modulated(name, per):
    layer, shape = layers_to_wrap()[name]
    wrapper = modulated(layer, Dynamic(8, per))
    assert isinstance(wrapper, ModulatedConv2d) == (name == "convolution")
    inputs = walk(4, 5, shape)
    for got, x in zip(outputs(wrapper, inputs), inputs, strict=True):
        assert relative_error(got, layer(x)) < 0.02


def test_other_layers_are_refused():
    with pytest.raises(UserError, match="type GELU cannot be modulated; valid: INT8Linear, Linear"):
        ModulatedLinear(nn.GELU(), Dynamic(8, "token"))


def test_integers_stay_integers():
    """The quantized layer multiplies codes of 8 bits at the first step, whatever comes later."""
    step = Step(Schedule(SIGMAS))
    layer, inputs = quantized_linear(step, bits=8), walk(5, 3)
    floats = [layer(x) for x in inputs]
    for got, wanted in zip(
        outputs(ModulatedLinear(layer, Dynamic(3, "token")), inputs), floats, strict=True
    ):
        assert relative_error(got, wanted) < 0.1
    scales = Static(step, [8] + [4] * 9, [0.05] * 10)
    static = ModulatedLinear(layer, scales)
    assert scales.largest == 127 and relative_error(outputs(static, inputs)[0], floats[0]) < 0.05


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), bits=st.integers(2, 8), offset=st.floats(-20, 20))
def test_a_tokens_range_is_told_by_integers_and_its_middle(seed, bits, offset):
    """The product is that of the values on the grid, and none of them is clipped."""
    step, (x,) = Step(Schedule(SIGMAS)), walk(seed, 1, (2, 5, 64))
    x, quantizer = x + offset, Dynamic(bits, "range", bits)
    told = quantizer(x, False)
    assert float(mx.abs(told.codes).max()) <= quantizer.largest
    assert float((mx.abs(told.values - x) / told.factor).max()) < 0.51
    plain = linear(columns=64)
    for layer in (
        QuantizedLinear.from_linear(plain, bits=8, runtime=Runtime(step, weights_only=True)),
        QuantizedLinear.from_linear(plain, group_size=32, runtime=Runtime(step)),
        INT8Linear.from_linear(plain),
        INT8Linear.from_linear(plain, block_size=32),
    ):
        got = ModulatedLinear(layer, None, values=quantizer)(x)
        wanted = ModulatedLinear(layer, None, values=Exactly())(told.values)
        assert relative_error(got, wanted) < 1e-4


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), bits=st.integers(2, 8), apart=st.floats(0, 30))
def test_a_negative_prompts_difference_is_told_by_integers(seed, bits, apart):
    """Of those tokens that it makes smaller; the product is that of the values."""
    step, (prompts,), (other,) = Step(Schedule(SIGMAS)), *(walk(seed + i, 1) for i in range(2))
    like, apart = (mx.array(v)[:, None] for v in ([1.0, 1, 1, 0, 1], [0.0, 0.01, 0.1, 0.01, apart]))
    negatives, quantizer = like * prompts + apart * other, Dynamic(bits, "guidance", bits)
    x, memory = mx.concatenate([prompts, negatives]), Memory()
    memory.reset(guided=True)
    layer = QuantizedLinear.from_linear(linear(), bits=8, runtime=Runtime(step, weights_only=True))
    wrapper = ModulatedLinear(layer, None, values=quantizer, memory=memory)
    told, _ = wrapper.moved(x, quantizer, False)
    assert relative_error(wrapper(x), ModulatedLinear(layer, None, values=Exactly())(told)) < 1e-4
    alone, own, change = (width(v) for v in (prompts, negatives, negatives - prompts))
    ranges = mx.concatenate([alone, mx.where(change < own, change + alone, own)])
    assert bool((mx.abs(told - x) <= 0.51 * ranges / (2**bits - 2)).all())  # half a step of each


def test_pairs_are_tokens_of_prompts_and_as_many_negative_ones():
    """A convolution mixes tokens of both kinds, so it takes each by itself."""
    (pixels,), told = walk(0, 1, (2, 6, 6, 8)), []
    for kind in ("guidance", "range"):
        convolution = nn.Conv2d(8, 6, 3, padding=1)
        convolution.weight = mx.ones_like(convolution.weight)
        convolution.bias = mx.zeros((6,))
        wrapper = modulated(convolution, None, values=Dynamic(8, kind, 8))
        wrapper.reset_cache(guided=True)
        told.append(np.array(wrapper(pixels)))
    np.testing.assert_array_equal(*told)
    wrapper = modulated(linear(), None, values=Dynamic(8, "guidance", 8))
    wrapper.reset_cache(guided=True)
    for shape in ((1, 5, 32), (3, 5, 32), (32,)):
        with pytest.raises(UserError, match="not that of prompts and as many negative ones"):
            wrapper(mx.zeros(shape))


def test_guidance_does_not_amplify_what_prompt_and_negative_err_alike():
    (prompts,), (change,) = walk(0, 1, (3, 5, 32)), walk(1, 1, (3, 5, 32))
    x, layer, weight = mx.concatenate([prompts, prompts + 0.02 * change]), linear(), 4.0

    def error(per: str) -> float:
        memory = Memory()
        memory.reset(guided=True)
        wrapper = ModulatedLinear(layer, None, values=Dynamic(6, per, 6), memory=memory)
        return relative_error(combined(wrapper(x), weight), combined(layer(x), weight))

    assert error("guidance") < 0.4 * error("range")


def test_int8_codes_are_multiplied_as_codes():
    """Their sums are exact, so those of a layer that takes tokens' scales itself are the same."""
    layer, (x,) = INT8Linear.from_linear(linear(columns=64)), walk(9, 1, (2, 5, 64))
    wrapper = ModulatedLinear(layer, Dynamic(8, "token"))
    np.testing.assert_allclose(outputs(wrapper, [x])[0], np.array(layer(x)), rtol=1e-5, atol=1e-5)


def test_what_it_remembers_is_no_part_of_the_model():
    memory = Memory()
    wrapper = ModulatedLinear(linear(), Dynamic(4, "token"), memory=memory)
    memory.reset()
    before = {name: p.nbytes for name, p in tree_flatten(wrapper.parameters())}
    wrapper(walk(6, 1)[0])
    assert {name: p.nbytes for name, p in tree_flatten(wrapper.parameters())} == before
    assert memory.nbytes == 4 * 2 * 5 * (32 + 16)
    wrapper.set_dtype(mx.float16)
    assert {array.dtype for array in memory.arrays[""]} == {mx.float32}


def test_a_picture_that_was_not_begun_is_refused():
    wrapper, (x,) = ModulatedLinear(linear(), Dynamic(4, "token")), walk(7, 1)
    with pytest.raises(UserError, match="never reset; call reset_cache"):
        wrapper(x)
    wrapper.reset_cache()
    wrapper(x)
    for other in (x[:1], x[:, :3]):
        with pytest.raises(UserError, match="another batch size or resolution"):
            wrapper(other)
    wrapper.reset_cache()
    wrapper(x[:1])


@pytest.mark.parametrize("bits", [1, 0, 9])
def test_bits_that_cannot_be_are_refused(bits):
    for make in (lambda: Dynamic(bits, "token"), lambda: Search(bits)):
        with pytest.raises(UserError, match=f"must be 2 to 8, got {bits}"):
            make()
    with pytest.raises(UserError, match=f"--act-bit must be 2 to 8, got {bits}"):
        Options(act_bit=bits)


def test_a_channels_scales_need_tokens():
    wrapper = ModulatedLinear(linear(), Dynamic(4, "channel"))
    wrapper.reset_cache()
    with pytest.raises(UserError, match="need tokens"):
        wrapper(mx.zeros((2, 32)))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_searched_scale_errs_least(bits):
    rng, limit = np.random.default_rng(0), 2 ** (bits - 1) - 1
    x = rng.standard_t(4, 50_000).astype(np.float32)

    def error(scale: float) -> float:
        return float(np.mean((x - np.clip(np.round(x / scale), -limit, limit) * scale) ** 2))

    found = best_scale(mx.array(x), bits)
    tried = np.abs(x).max() / limit * np.geomspace(1, 0.02, 300)
    assert error(found) < 1.05 * min(map(error, tried))
    assert best_scale(mx.zeros((3, 4)), bits) > 0
    assert found <= best_scale(mx.array(x), bits, 10.0) <= 1.001 * np.abs(x).max() / limit


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), size=st.floats(1e-6, 1e6))
def test_values_are_counted_alike_on_a_device(seed, size):
    x = size * walk(seed, 1, (3, 40, 16))[0]
    largest = float(mx.abs(x).max())
    there, here = (histogram(x, largest, on_device) for on_device in (True, False))
    np.testing.assert_array_equal(there, here)
    assert here.sum() == x.size and here[-2:].sum() > 0


def modulated_pipeline(options: Options, steps: int = 4, **of_model):
    """tiny with modulated layers, and what it draws of one prompt."""
    pipeline = quantized_pipeline(weights_only=True, modulation=False, **of_model)
    work = Work.of(pipeline, steps, 4.0)
    level = pipeline.transformer._level
    prepared = prepare(pipeline, options, work, level, lambda line: None)
    apply(pipeline, prepared, level)
    return pipeline


def latent(pipeline, seeds=(0,), steps: int = 4) -> np.ndarray:
    prompts = [PROMPT] * len(seeds)
    return np.array(pipeline.sample(prompts, list(seeds), num_steps=steps))


@pytest.fixture(scope="module")
def floats() -> np.ndarray:
    """What the model draws whose inputs are not quantized."""
    return latent(quantized_pipeline(weights_only=True, modulation=False), steps=MANY)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_modulates_is_nearer_to_floats(kind, floats):
    options = {"residual_scale": kind, "scale_pictures": 2}
    plain, changes = (
        latent(modulated_pipeline(Options(which, 8, **options), steps=MANY), steps=MANY)
        for which in (None, "all")
    )
    assert relative_error(changes, floats) < 0.6 * relative_error(plain, floats)


def test_only_guidance_makes_pairs():
    """Without it a batch's second half is other pictures, which the first must not depend on."""
    pipeline = modulated_pipeline(Options(None, 8, "guidance"))
    memory = pipeline.transformer.memory
    for weight, doubled in ((4.0, True), (1.0, False), (0.0, False), (2.0, True)):
        pipeline.velocity(pipeline.condition([PROMPT], weight), weight)
        assert memory.guided == doubled
    wrapper = ModulatedLinear(linear(), None, values=Dynamic(4, "guidance", 4), memory=memory)
    (x,), pairs = walk(0, 1, (4, 5, 32)), mx.array([0, 2])
    for doubled in (False, True):
        memory.reset(doubled)
        together = wrapper(x)
        assert relative_error(wrapper(x[pairs]), together[pairs]) < 1e-5
    memory.reset()
    assert relative_error(wrapper(x[:2]), wrapper(x)[:2]) < 1e-5


def test_every_picture_begins_anew():
    """Whatever was drawn before, and however many."""
    pipeline = modulated_pipeline(Options("all", 8, "tensor"))
    alone, together = latent(pipeline), latent(pipeline, (0, 1, 2))
    assert relative_error(together[:1], alone) < 0.02
    np.testing.assert_array_equal(latent(pipeline), alone)


@pytest.mark.parametrize("kind", ["static", "tensor"])
def test_a_model_in_int8_modulates_all_its_layers(kind):
    """As many as in floats, counted and remembered alike, and near to what it draws without."""
    pipeline = load_pipeline("tiny")
    paths = list(layers_of(pipeline.transformer))
    layers = {p: INT8Linear.from_linear(m) for p, m in layers_of(pipeline.transformer).items()}
    nbytes = cache_bytes(pipeline, four_steps(pipeline))
    pipeline.transformer.update_modules(tree_unflatten(list(layers.items())))
    assert list(layers_of(pipeline.transformer)) == paths
    assert cache_bytes(pipeline, four_steps(pipeline)) == nbytes
    wanted = latent(pipeline)
    options = Options("all", 8, kind, scale_pictures=1)
    apply(pipeline, prepare(pipeline, options, four_steps(pipeline), None, print), None)
    assert relative_error(latent(pipeline), wanted) < 0.1
    assert pipeline.transformer.memory.nbytes == sum(nbytes.values())


@pytest.mark.slow
def test_what_auto_leaves_is_told_by_its_tokens_ranges_and_in_pairs():
    """Also beside static scales, of which it then has none; with other bits, or as before."""
    pipeline = quantized_pipeline(weights_only=True, modulation=False)
    layers, work = layers_of(pipeline.transformer), four_steps(pipeline)
    few = sum(cache_bytes(pipeline, work).values()) / 4e9
    level = pipeline.transformer._level
    for kind in ("static", "tensor"):
        options = Options("auto", 8, kind, few, scale_pictures=1)
        for more, wanted in (
            ({}, Dynamic(8, "guidance", 8)),
            ({"rest_bit": 6, "rest_scale": "range"}, Dynamic(6, "range", 6)),
            ({"rest_bit": 6, "rest_scale": "token"}, Dynamic(6, "token", 6)),
            ({"rest_scale": "same"}, None if kind == "static" else Dynamic(8, "tensor", 8)),
        ):
            prepared = prepare(pipeline, replace(options, **more), work, level, lambda line: None)
            wrappers, chosen = apply(pipeline, prepared, level), set(prepared.choice.layers)
            left = [w for path, w in wrappers.items() if path not in chosen]
            assert left and chosen and not any(layer.modulates for layer in left)
            assert all(w.modulates for path, w in wrappers.items() if path in chosen)
            if wanted is not None:
                assert all(layer._quantizer == wanted for layer in left)
            measured = {} if kind != "static" else chosen if wanted else set(layers)
            assert set(prepared.scales or {}) == set(measured)
            assert np.isfinite(latent(pipeline)).all()
            unwrap(pipeline.transformer, layers, level)


def test_a_run_that_goes_on_is_told_what_auto_left():
    """By name, so that pictures of another default are not mixed with it."""
    auto = Options("auto", modulate_memory=1.0)
    assert auto.settings() == replace(auto, rest_scale="guidance").settings()
    assert auto.settings() != replace(auto, rest_scale="range").settings()
    assert Options("all").settings()["rest_scale"] is None


def test_steps_that_do_not_hang_together_are_refused():
    pipeline = modulated_pipeline(Options("all", 8, scale_pictures=1))
    conditioning = pipeline.condition([PROMPT], 4.0)
    shape, sigmas = pipeline.latent_shape(64, 64), pipeline.sigmas(4)
    velocity = pipeline.velocity(conditioning, 4.0)
    denoise(velocity, Noise([0]), sigmas, shape)
    with pytest.raises(UserError, match="noise level rose from .* call reset_cache"):
        denoise(velocity, Noise([1]), sigmas, shape)
    first, _ = pipeline.velocity(conditioning, 4.0), pipeline.velocity(conditioning, 4.0)
    with pytest.raises(UserError, match="another picture was begun before this one was finished"):
        denoise(first, Noise([0]), sigmas, shape)
    with pytest.raises(UserError, match="none of the 4 that the scales .* were measured at"):
        latent(pipeline, steps=5)
    velocity = pipeline.velocity(conditioning, 4.0)
    velocity(mx.zeros((1, *shape)), mx.array(1.0))
    with pytest.raises(UserError, match="another batch size or resolution"):
        velocity(mx.zeros((1, shape[0] // 2, *shape[1:])), mx.array(float(sigmas[1])))
    # Static scales are those of changes from each step to the next.
    velocity, zeros = pipeline.velocity(conditioning, 4.0), mx.zeros((1, *shape))
    with pytest.raises(UserError, match="is step 1 .* before was none; begin with the first"):
        velocity(zeros, mx.array(float(sigmas[1])))
    velocity(zeros, mx.array(float(sigmas[0])))
    with pytest.raises(UserError, match="is step 2 .* before was 0; .* leave none out"):
        velocity(zeros, mx.array(float(sigmas[2])))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_traces_serve_fifty_steps(kind):
    """The first step's and that of all others; also of further pictures, after a reset."""
    pipeline = modulated_pipeline(Options("all", 4, kind, scale_pictures=1), steps=50)
    model, conditioning = pipeline.transformer, pipeline.condition([PROMPT], 4.0)
    traces = []

    def run(latent: mx.array, sigma: mx.array) -> mx.array:
        traces.append(sigma)
        return guided(model, latent, sigma, conditioning.text, conditioning.pooled, 4.0)

    kept = model.memory.arrays
    compiled = mx.compile(run, inputs=[model.state, kept], outputs=kept)
    for _ in range(2):
        model.reset_cache()
        for sigma in pipeline.sigmas(50)[:-1]:
            compiled(mx.zeros((1, 8, 8, 16)), mx.array(float(sigma)))
    assert len(traces) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["token", "guidance"])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_compiled_picture_is_the_eager_one(kind, quantized):
    pipeline, options = load_pipeline("tiny"), Options("all", 8, kind)
    if quantized:
        pipeline = modulated_pipeline(options)
    else:
        apply(pipeline, prepare(pipeline, options, Work.of(pipeline, 4, 4.0), None, print), None)
    conditioning, sigmas = pipeline.condition([PROMPT], 4.0), pipeline.sigmas(4)
    drawn = [
        denoise(
            pipeline.velocity(conditioning, 4.0, compiled=compiled),
            Noise([0]),
            sigmas,
            pipeline.latent_shape(64, 64),
        )
        for compiled in (False, True, True)
    ]
    # Compiled code may round an input's last digit otherwise, which moves single codes.
    assert relative_error(drawn[1], drawn[0]) < 0.02
    np.testing.assert_array_equal(np.array(drawn[1]), np.array(drawn[2]))


@pytest.mark.slow
def test_each_of_the_three_can_be_switched():
    exact = latent(load_pipeline("tiny"), steps=MANY)
    pipeline = quantized_pipeline(weights_only=True, modulation=False)
    model, level = pipeline.transformer, pipeline.transformer._level
    only_weights = latent(pipeline, steps=MANY)
    originals = block_linears(load_pipeline("tiny").transformer)
    options = Options("all", 8, "tensor")
    prepared = prepare(pipeline, options, Work.of(pipeline, MANY, 4.0), level, print)
    apply(pipeline, prepared, level, originals)

    def error(wanted: np.ndarray, **state: bool) -> float:
        assert set_quant_state(model, **state) == len(originals)
        return relative_error(latent(pipeline, steps=MANY), wanted)

    assert error(exact, weights=False, activations=False) < 1e-4
    assert error(only_weights, activations=False) < 1e-4
    plain, changes = (error(only_weights, modulate=on) for on in (False, True))
    assert 1e-4 < changes < 0.6 * plain
    assert 1e-4 < error(exact, weights=False) < error(exact, weights=False, modulate=False)
    with pytest.raises(UserError, match="no modulated layer to switch"):
        set_quant_state(load_pipeline("tiny").transformer)


def test_weights_that_were_not_kept_cannot_be_switched_to():
    model = modulated_pipeline(Options("all", 8, "tensor")).transformer
    with pytest.raises(UserError, match="no 16-bit weights to go back to"):
        set_quant_state(model, weights=False)


def test_what_is_kept_holds_nothing_else_in_memory():
    """Such as the codes of the last change, and what â was before it."""
    pipeline = modulated_pipeline(Options("all", 8, "tensor"))
    velocity, sigmas = pipeline.velocity(pipeline.condition([PROMPT], 4.0), 4.0), (1.0, 0.9, 0.8)
    for sigma in sigmas:
        mx.eval(velocity(mx.zeros((1, 8, 8, 16)), mx.array(sigma)))
    mx.synchronize()  # a GPU lets go of what a kernel needed some time after it
    held = mx.get_active_memory()
    mx.eval(pipeline.transformer.memory.arrays)
    assert mx.get_active_memory() == held


def test_a_switch_that_is_refused_changes_nothing():
    """No part of the layer, and no other layer."""
    first, second = (linear(seed) for seed in (0, 1))
    model = nn.Sequential(
        ModulatedLinear(first, Dynamic(4, "token"), values=Dynamic(4, "token", 4), exact=first),
        ModulatedLinear(second, Dynamic(4, "token"), exact=second),
    )
    for state in ({"modulate": False}, {"weights": False, "modulate": False}):
        with pytest.raises(UserError, match="no scales for its input as it is"):
            set_quant_state(model, **state)
        assert all(layer.modulates for layer in model.layers)
        assert all(layer._parts is layer._quantized for layer in model.layers)


def four_steps(pipeline) -> Work:
    return Work.of(pipeline, 4, 4.0)


def test_layers_leave_when_their_context_ends():
    pipeline = load_pipeline("tiny")
    before, layers = latent(pipeline), layers_of(pipeline.transformer)
    scales = Dynamic(8, "token")
    with (
        pytest.raises(RuntimeError),
        wrapped(pipeline.transformer, dict.fromkeys(layers, (scales, None)), None),
    ):
        assert relative_error(latent(pipeline), before) > 1e-6
        raise RuntimeError
    np.testing.assert_array_equal(latent(pipeline), before)
    assert pipeline.transformer.memory is None
    apply(
        pipeline,
        prepare(pipeline, Options("all", 8, "token"), four_steps(pipeline), None, print),
        None,
    )
    assert len(layers_of(pipeline.transformer)) == len(layers)
    unwrap(pipeline.transformer, layers, None)
    np.testing.assert_array_equal(latent(pipeline), before)


def test_the_bytes_that_are_told_are_those_that_are_kept():
    pipeline, lines = load_pipeline("tiny"), []
    work = Work.of(pipeline, 4, 4.0, batch_size=3)
    prepared = prepare(pipeline, Options("fc2", 8, "token"), work, None, lines.append)
    apply(pipeline, prepared, None)
    latent(pipeline, (0, 1, 2))
    assert prepared.choice.taken == pipeline.transformer.memory.nbytes
    assert all(path.endswith("fc2") for path in prepared.choice.layers)
    assert len(lines) == 1 and f"{len(prepared.choice.layers)} of" in lines[0]


def test_what_measuring_keeps_is_told_and_counted():
    """Static scales are measured on some pictures at once, more than are drawn at once later."""
    pipeline, lines = load_pipeline("tiny"), []
    work, held = four_steps(pipeline), []

    class Watch:
        def step(self, step) -> None:
            held.append(pipeline.transformer.memory.nbytes)

    options = Options("fc2", 8, scale_pictures=3)
    prepared = prepare(pipeline, options, work, None, lines.append, [Watch()])
    assert prepared.choice.taken == max(held) and "3 pictures at once" in lines[0]
    limit = (prepared.choice.taken - 1) / 1e9
    with pytest.raises(UserError, match="3 pictures at once.* measure static scales on fewer"):
        refuse(pipeline, replace(options, modulate_memory=limit), work)


class Counting:
    """A text encoder that counts how often it is asked: SD3's reads T5 from the disk each time."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder, self.asked = encoder, 0

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        self.asked += 1
        return self.encoder(prompts)

    def tokens(self) -> int:
        return self.encoder.tokens()


def test_texts_are_encoded_once_for_all_layers():
    pipeline = load_pipeline("tiny")
    counting = Counting(pipeline.encode_text)
    pipeline, work = replace(pipeline, encode_text=counting), four_steps(pipeline)
    found = gains_of(pipeline, Options("auto", modulate_memory=1.0), work, None, lambda line: None)
    assert counting.asked == 1 and len(found) > 1
    for options in (Options("all"), Options("all", modulate_memory=1.0), Options(None, 8, "token")):
        refuse(pipeline, options, work)
    prepare(pipeline, Options("all", 8, "token"), work, None, print)
    assert counting.asked == 1  # counting bytes takes how many tokens a text has, and no text


@pytest.mark.parametrize(
    ("options", "pictures", "words"),
    [
        (Options("all", 8, "token"), 3, "give a smaller --batch-size, a --modulate pattern"),
        (Options("all", scale_pictures=3), 1, "give fewer --scale-pictures, a --modulate pattern"),
        (Options("all", 8, "token"), 1, "give a --modulate pattern of fewer layers, or --modulate"),
        (Options("auto", 8, "token", 9e9), 3, "--modulate-memory 9000000000.0 GB lets .* smaller"),
    ],
)
def test_what_memory_has_no_room_for_is_refused_before_anything_is_measured(
    monkeypatch, options, pictures, words
):
    """Counted with the model's weights; where they just fit, all of it runs."""
    pipeline, lines = load_pipeline("tiny"), []
    work = Work.of(pipeline, 4, 4.0, pictures)
    kept = sum(cache_bytes(pipeline, largest_work(options, work)).values())
    weights = sum(array.nbytes for _, array in tree_flatten(pipeline.transformer.parameters()))
    needed = kept + weights
    monkeypatch.setattr(cli, "memory_bytes", lambda: needed - 1)
    numbers = f"weights that is {human_bytes(needed)}, this machine has {human_bytes(needed - 1)}; "
    with pytest.raises(UserError, match=words) as refused:
        prepare(pipeline, options, work, None, lines.append)
    assert numbers in str(refused.value) and not lines
    refuse(pipeline, options, work)  # its weights are not counted before they are known
    monkeypatch.setattr(cli, "memory_bytes", lambda: needed)
    prepare(pipeline, options, work, None, lines.append)
    assert "modulation keeps" in "".join(lines)


def test_a_budget_takes_the_largest_gains_for_a_byte():
    gains = {"a": 8.0, "b": 3.0, "c": 1.0, "d": -1.0}
    nbytes = {"a": 80, "b": 10, "c": 5, "d": 1}
    assert within(100, gains, nbytes) == ["a", "b", "c"]
    assert within(20, gains, nbytes) == ["b", "c"]
    assert within(84, gains, nbytes) == ["b", "c"]  # what does not fit is passed over
    with pytest.raises(UserError, match="no layer fits into --modulate-memory"):
        within(4, gains, nbytes)
    with pytest.raises(UserError, match="removes no error in any layer"):
        within(100, {"a": 0.0, "d": -1.0}, nbytes)


@pytest.mark.slow
def test_auto_stays_within_its_memory_and_helps(floats):
    half = sum(cache_bytes(load_pipeline("tiny"), four_steps(load_pipeline("tiny"))).values()) / 2
    errors = {}
    memory = {"modulate_memory": half / 1e9}
    for name, more in {
        "all": {},
        "plain": {"modulate": None},
        "auto": {"modulate": "auto", **memory},
        "auto, the rest as before": {"modulate": "auto", "rest_scale": "same", **memory},
    }.items():
        options = Options(**{"modulate": "all", "residual_scale": "tensor"} | more)
        pipeline = modulated_pipeline(options, steps=MANY)
        errors[name] = relative_error(latent(pipeline, steps=MANY), floats)
        if options.modulate == "auto":
            assert 0 < pipeline.transformer.memory.nbytes <= half
    assert errors["all"] < errors["auto, the rest as before"] < errors["plain"]
    assert errors["auto"] < 0.9 * errors["auto, the rest as before"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modulate": "fc7"}, "matches none of"),
        ({"modulate": "all", "modulate_memory": 1e-6}, "more than --modulate-memory 1e-06"),
        ({"modulate": "auto"}, "needs --modulate-memory"),
        ({"modulate": "all", "modulate_memory": -1.0}, "must be above 0 GB"),
        ({"modulate": ""}, "--modulate is empty"),
        ({"residual_scale": "row"}, "unknown --residual-scale 'row'"),
        ({"scale_pictures": 0}, "--scale-pictures must be at least 1"),
        ({"modulate": "all", "rest_bit": 8}, "for the layers that --modulate auto leaves"),
        ({"rest_scale": "token"}, "for the layers that --modulate auto leaves"),
        (
            {"modulate": "auto", "modulate_memory": 1.0, "rest_scale": "static"},
            "unknown --rest-scale 'static'; valid: same, tensor, token, range, guidance, channel",
        ),
        (
            {"modulate": "auto", "modulate_memory": 1.0, "rest_bit": 1},
            "--rest-bit must be 2 to 8, got 1",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    pipeline = load_pipeline("tiny")
    with pytest.raises(UserError, match=words):
        prepare(pipeline, Options(**options), four_steps(pipeline), None, print)
