"""quant_config.json: what is written comes back, and what cannot be is refused by name."""

from __future__ import annotations

import json

from src.errors import UserError
from src.quant.artifacts import LayerConfig, QuantConfig

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

NAME = "multimodal_transformer_blocks.0.image_transformer_block.mlp.fc1"
SCALES = st.floats(1e-6, 1e6).map(lambda value: float(np.float32(value)))


def config_of(layer: LayerConfig) -> QuantConfig:
    steps = range(len(layer.bits))
    made_from = {"model": "tiny", "model_hash": "0" * 64}
    sigmas = [1.0 - step / 10 for step in steps]
    return QuantConfig(made_from, [2 * step for step in steps], sigmas, {NAME: layer})


@st.composite
def layers(draw) -> LayerConfig:
    steps, smoothed = draw(st.integers(1, 5)), draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    scales = st.lists(SCALES, min_size=steps, max_size=steps)
    vector = rng.uniform(0.1, 10, 6).astype(np.float32)
    return LayerConfig(
        bits=draw(st.lists(st.sampled_from([4, 6, 8]), min_size=steps, max_size=steps)),
        scale=draw(scales),
        shift=draw(st.sampled_from([None, vector - 5])),
        smoothing=vector if smoothed else None,
        coarse=draw(st.integers(1, 8)),
        coarse_sides=draw(st.sampled_from([1, 2])),
        plain_scale=draw(scales) if smoothed and draw(st.booleans()) else None,
    )


@given(layer=layers())
def test_a_layer_comes_back_as_it_was_written(layer, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "quant_config.json"
    config_of(layer).save(path)
    read = QuantConfig.load(path)
    (got,) = read.layers.values()
    assert (read.step_keys, read.sigmas) == (config_of(layer).step_keys, config_of(layer).sigmas)
    for name, wanted in vars(layer).items():
        found = getattr(got, name)
        if isinstance(wanted, np.ndarray):
            assert np.array_equal(found, wanted), name
        else:
            assert found == wanted and type(found) is type(wanted), name


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("coarse", 0, "coarse of .*fc1 is 0; valid: 1 or more"),
        ("coarse", -2, "coarse of .*fc1 is -2"),
        ("coarse", 2.0, "coarse of .*fc1 is 2.0"),
        ("coarse", "4", "coarse of .*fc1 is 4"),
        ("coarse", True, "coarse of .*fc1 is True"),
        ("coarse", None, "coarse of .*fc1 is None"),
        ("coarse_sides", 0, "coarse_sides of .*fc1 is 0; valid: 1 or 2"),
        ("coarse_sides", 3, "coarse_sides of .*fc1 is 3"),
        ("coarse_sides", 1.0, "coarse_sides of .*fc1 is 1.0"),
        ("coarse_sides", "2", "coarse_sides of .*fc1 is 2"),
        ("coarse_sides", [2], r"coarse_sides of .*fc1 is \[2\]"),
        ("scale", 0.0, "scale of .*fc1 is 0.0; valid: above 0"),
        ("scale", float("inf"), "'Infinity' is not a finite number"),
        ("plain_scale", -1.0, "scale of .*fc1 is -1.0"),
        ("bits", 9, "bits of .*fc1 must be 2 to 8, got 9"),
        ("scale", "wide", "not a whole quantization config"),
        ("bits", "8", "not a whole quantization config"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(key, value, words, tmp_path):
    path = tmp_path / "quant_config.json"
    smoothing = np.ones(3, np.float32)
    config_of(
        LayerConfig([8], [0.5], None, smoothing, coarse=4, coarse_sides=2, plain_scale=[0.7])
    ).save(path)
    data = json.loads(path.read_text())
    data["per_timestep"]["0"][NAME][key] = value
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=words) as caught:
        QuantConfig.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["bits", "scale", "shift", "coarse", "coarse_sides"])
def test_a_missing_value_is_named(key, tmp_path):
    path = tmp_path / "quant_config.json"
    config_of(LayerConfig([8], [0.5])).save(path)
    data = json.loads(path.read_text())
    del data["per_timestep"]["0"][NAME][key]
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"not a whole quantization config.*{key}"):
        QuantConfig.load(path)


@pytest.mark.parametrize("key, value", [("coarse", 3), ("coarse_sides", 1), ("shift", None)])
def test_what_must_be_the_same_at_all_steps_is_so(key, value, tmp_path):
    path = tmp_path / "quant_config.json"
    shift = np.ones(3, np.float32)
    config_of(LayerConfig([8, 4], [0.5, 1.0], shift, None, coarse=4, coarse_sides=2)).save(path)
    data = json.loads(path.read_text())
    data["per_timestep"]["2"][NAME][key] = value
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"{key} of .*fc1 differs between steps"):
        QuantConfig.load(path)


def test_a_config_that_cannot_be_is_not_written(tmp_path):
    with pytest.raises(UserError, match="coarse of .* is 0"):
        config_of(LayerConfig([8], [0.5], coarse=0)).save(tmp_path / "quant_config.json")
    assert not list(tmp_path.iterdir())


def test_without_its_smoothing_a_layer_takes_the_scale_measured_for_that():
    factors = np.array([0.5, 4.0], np.float32)
    smoothed = LayerConfig([8, 6], [1.0, 2.0], None, factors, 2, 2, plain_scale=[3.0, 5.0])
    plain = smoothed.unsmoothed()
    assert plain.scale == [3.0, 5.0] and plain.smoothing is None and plain.plain_scale is None
    assert (plain.bits, plain.coarse, plain.coarse_sides) == ([8, 6], 2, 2)
    unknown = LayerConfig([8], [1.0], None, factors).unsmoothed()
    assert unknown.scale == [4.0] and unknown.smoothing is None
    untouched = LayerConfig([8], [1.0])
    assert untouched.unsmoothed() is untouched
