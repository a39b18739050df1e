"""Artifacts into a model: what is refused, and that a quantized model runs as one."""

from __future__ import annotations

import dataclasses

from src.errors import UserError
from src.models.load import load_pipeline
from src.models.paths import block_linears
from src.quant.artifacts import (
    OUTPUT_FORMAT,
    OUTPUT_VERSION,
    LayerConfig,
    QuantConfig,
    RoundedLayer,
    block_file,
    save_rounded_block,
)
from src.quant.grid import absmax_scale, nearest_codes
from src.quant.inject import check_layers, inject, injected
from src.quant.linear import QuantizedLinear
from src.quant.loading import check_config, load_rounded
from src.sampling import guided, sd3_sigmas
from src.store import Manifest

import mlx.core as mx
import numpy as np
import pytest

from .helpers import random_inputs, relative_error

FC2 = "multimodal_transformer_blocks.0.image_transformer_block.mlp.fc2"
SIGMAS = [float(s) for s in sd3_sigmas(10)[:-1]]


def rounded_layers(pipeline, bits: int = 4) -> dict[str, RoundedLayer]:
    """Every block linear of the model, with the nearest codes."""
    layers = {}
    for path, linear in block_linears(pipeline.transformer).items():
        scale = absmax_scale(linear.weight, bits)
        codes = np.array(nearest_codes(linear.weight, scale, bits))
        layers[path] = RoundedLayer(codes, np.array(scale), np.ones(10, np.float32))
    return layers


def config_for(layers, **model) -> QuantConfig:
    """Tiers and scales that change over the steps; fc2 has a shift."""
    grids = {}
    for path, layer in layers.items():
        columns = layer.codes.shape[1]
        shift = np.full(columns, 0.1, np.float32) if path.endswith("fc2") else None
        grids[path] = LayerConfig([8] * 5 + [6] * 5, np.geomspace(0.06, 0.2, 10).tolist(), shift)
    return QuantConfig(model, list(range(10)), SIGMAS, grids)


def write_folder(
    folder, pipeline, layers, model_hash=None, bits=4, blocks=(0, 1), **hashes
) -> None:
    """What the weight track leaves behind."""
    made_from = {"model": pipeline.name, "model_hash": model_hash or pipeline.hash, **hashes}
    manifest = Manifest.open(
        folder,
        format=OUTPUT_FORMAT,
        version=OUTPUT_VERSION,
        settings={"bits_w": bits},
        made_from=made_from,
    )
    for index in blocks:
        own = {p: layer for p, layer in layers.items() if p.split(".")[1] == str(index)}
        save_rounded_block(folder, index, own)
        manifest.mark(f"mm{index}", [block_file(index)])
    manifest.finish([f"mm{index}" for index in blocks])


def velocity(pipeline, sigma) -> np.ndarray:
    inputs = random_inputs(pipeline.transformer.config, 8, 8)
    return np.array(pipeline.transformer(*inputs, 1000 * mx.broadcast_to(mx.array(sigma), (2,))))


def test_a_model_is_quantized_from_its_folder(tmp_path):
    pipeline = load_pipeline("tiny")
    write_folder(tmp_path, pipeline, rounded_layers(pipeline))
    found = load_rounded(tmp_path, pipeline.name, pipeline.hash, 2)
    exact = velocity(pipeline, 0.5)
    config = config_for(found.layers)
    result = inject(pipeline.transformer, found.layers, bits=found.bits, config=config)
    modules = dict(pipeline.transformer.named_modules())
    assert result.notes == [] and set(result.layers) == set(found.layers)
    assert all(isinstance(modules[path], QuantizedLinear) for path in found.layers)
    assert not block_linears(pipeline.transformer)
    assert 0.001 < relative_error(velocity(pipeline, 0.5), exact) < 0.5


def test_every_call_runs_at_the_step_of_its_timesteps():
    """Nobody has to tell the model where it is, and a batch may mix steps."""
    pipeline = load_pipeline("tiny")
    layers = rounded_layers(pipeline)
    result = inject(pipeline.transformer, layers, config=config_for(layers))
    apart = [velocity(pipeline, sigma)[row] for row, sigma in enumerate((SIGMAS[1], SIGMAS[8]))]
    together = velocity(pipeline, np.array([SIGMAS[1], SIGMAS[8]], np.float32))
    for row in range(2):
        np.testing.assert_allclose(together[row], apart[row], atol=1e-5)
    assert result.step.place.tolist() == [0]  # as before the calls
    block = pipeline.transformer.multimodal_transformer_blocks[0].image_transformer_block
    x = mx.ones((1, 3, 256))
    outputs = []
    for sigma in (SIGMAS[1], SIGMAS[8]):
        pipeline.transformer.set_sigma(sigma)
        outputs.append(np.array(block.mlp.fc2(x)))
    assert relative_error(*outputs) > 1e-4


def compiled_step(a_scale: str):
    """A quantized model's guided step, eager and compiled, and the list of its traces."""
    pipeline = load_pipeline("tiny")
    layers = rounded_layers(pipeline)
    inject(pipeline.transformer, layers, config=config_for(layers), a_scale=a_scale)
    conditioning = pipeline.condition(["a large red star in the center on a night background"], 4.0)
    traces = []

    def run(latent: mx.array, sigma: mx.array) -> mx.array:
        traces.append(sigma)
        text, pooled = conditioning.text, conditioning.pooled
        return guided(pipeline.transformer, latent, sigma, text, pooled, 4.0)

    return run, mx.compile(run, inputs=pipeline.transformer.state), traces


LATENT = (1, 8, 8, 16)


@pytest.mark.parametrize("a_scale", ["static", "token"])
def test_one_trace_serves_fifty_steps(a_scale):
    """Also steps that were never measured, and after an eager call in between."""
    run, compiled, traces = compiled_step(a_scale)
    for sigma in sd3_sigmas(50)[:-1]:
        compiled(mx.zeros(LATENT), mx.array(float(sigma)))
    assert len(traces) == 1
    mx.eval(run(mx.zeros(LATENT), mx.array(0.3)))
    compiled(mx.zeros(LATENT), mx.array(0.3))
    assert len(traces) == 2  # the eager call's is the other


@pytest.mark.slow
def test_a_compiled_step_computes_what_the_eager_one_does():
    run, compiled, traces = compiled_step("static")
    latent = mx.random.normal(LATENT, key=mx.random.key(0))
    outputs = []
    for sigma in (1.0, 0.5, 0.1):
        outputs.append(compiled(latent, mx.array(sigma)))
        # Compiled code may round an input's last digit otherwise, which moves single codes.
        assert relative_error(outputs[-1], run(latent, mx.array(sigma))) < 0.02
    assert relative_error(outputs[0], outputs[2]) > 0.05
    assert len(traces) == 1 + 3


def test_weights_alone_run_in_sixteen_bits_loudly():
    pipeline, rounded = load_pipeline("tiny"), load_pipeline("tiny")
    layers = rounded_layers(pipeline)
    result = inject(rounded.transformer, layers)
    assert result.step is None
    assert result.notes == ["no quant config: activations stay in 16 bits (W4A16)"]
    for path, linear in block_linears(pipeline.transformer).items():
        linear.weight = mx.array(layers[path].codes * layers[path].scale)
    assert relative_error(velocity(rounded, 0.5), velocity(pipeline, 0.5)) < 1e-5


def test_smoothing_that_was_not_folded_in_is_left_out_loudly():
    pipeline = load_pipeline("tiny")
    layers, exact = rounded_layers(pipeline), velocity(pipeline, 0.5)
    config = config_for(layers)
    smoothing = np.geomspace(0.5, 2, layers[FC2].codes.shape[1]).astype(np.float32)
    config.layers[FC2] = dataclasses.replace(config.layers[FC2], smoothing=smoothing)
    result = inject(pipeline.transformer, layers, config=config)
    assert len(result.notes) == 1 and FC2 in result.notes[0] and "1 layers" in result.notes[0]
    assert relative_error(velocity(pipeline, 0.5), exact) < 0.5

    pipeline = load_pipeline("tiny")
    layers[FC2] = dataclasses.replace(layers[FC2], smoothing=2 * smoothing)
    with pytest.raises(UserError, match=f"{FC2} was rounded with a smoothing that is not"):
        inject(pipeline.transformer, layers, config=config)
    config.layers[FC2] = dataclasses.replace(config.layers[FC2], smoothing=2 * smoothing)
    assert inject(pipeline.transformer, layers, config=config).notes == []


def test_a_shift_that_weights_were_not_rounded_with_changes_nothing_in_floats():
    """Their biases are corrected for the whole input, which a shift must not do a second time."""
    pipeline = load_pipeline("tiny")
    corrected = {
        path: dataclasses.replace(layer, bias=np.linspace(-1, 1, len(layer.codes), dtype="float32"))
        for path, layer in rounded_layers(pipeline).items()
    }
    config, plain = config_for(corrected), load_pipeline("tiny")
    inject(plain.transformer, corrected)
    wanted = velocity(plain, 0.5)
    for folded in (False, True):
        shifted = load_pipeline("tiny")
        inject(shifted.transformer, corrected, config=config, folded=folded, weights_only=True)
        error = relative_error(velocity(shifted, 0.5), wanted)
        assert (error > 1e-3) if folded else (error < 1e-5)


def test_layers_leave_when_their_context_ends():
    pipeline = load_pipeline("tiny")
    layers, exact = rounded_layers(pipeline), velocity(pipeline, 0.5)
    checked = check_layers(pipeline.transformer, layers, config=config_for(layers))
    np.testing.assert_array_equal(velocity(pipeline, 0.5), exact)
    with pytest.raises(RuntimeError), injected(pipeline.transformer, checked, a_scale="token"):
        assert relative_error(velocity(pipeline, 0.5), exact) > 1e-3
        raise RuntimeError
    np.testing.assert_array_equal(velocity(pipeline, 0.5), exact)


def test_folders_that_are_not_whole_are_refused(tmp_path):
    pipeline = load_pipeline("tiny")
    layers = rounded_layers(pipeline)
    with pytest.raises(UserError, match="no folder .*none.*adaround_optimize"):
        load_rounded(tmp_path / "none", pipeline.name, pipeline.hash, 2)
    write_folder(tmp_path / "part", pipeline, layers, blocks=(0,))
    with pytest.raises(UserError, match=r"lacks 1 of 2 blocks: mm1\.npz"):
        load_rounded(tmp_path / "part", pipeline.name, pipeline.hash, 2)
    write_folder(tmp_path / "other", pipeline, layers, model_hash="0" * 64)
    with pytest.raises(UserError, match="model_hash"):
        load_rounded(tmp_path / "other", pipeline.name, pipeline.hash, 2)
    write_folder(tmp_path / "changed", pipeline, layers)
    path = tmp_path / "changed" / block_file(1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"mm1\.npz of unit .* is missing or was changed"):
        load_rounded(tmp_path / "changed", pipeline.name, pipeline.hash, 2)
    mixed = layers | {FC2: rounded_layers(pipeline, bits=8)[FC2]}
    write_folder(tmp_path / "mixed", pipeline, mixed)
    with pytest.raises(UserError, match=rf"mm0\.npz: codes of {FC2} go from -1\d\d to 1\d\d"):
        load_rounded(tmp_path / "mixed", pipeline.name, pipeline.hash, 2)


def test_what_does_not_fit_the_model_is_refused_and_leaves_it_as_it_was():
    pipeline = load_pipeline("tiny")
    model, layers = pipeline.transformer, rounded_layers(pipeline)
    before, config = velocity(pipeline, 0.5), config_for(layers)
    nowhere = FC2.replace("fc2", "fc3")
    short = dataclasses.replace(layers[FC2], codes=layers[FC2].codes[:, :64])
    wild = dataclasses.replace(layers[FC2], codes=layers[FC2].codes * 3)
    few = dataclasses.replace(config, layers={p: c for p, c in config.layers.items() if p != FC2})
    shifted = dataclasses.replace(config.layers[FC2], shift=np.zeros(5, np.float32))
    odd = dataclasses.replace(config, layers=config.layers | {FC2: shifted})
    for wrong, using, words in (
        (layers | {nowhere: layers[FC2]}, config, f"no linear '{nowhere}'"),
        ({}, config, "name no layer"),
        (layers | {FC2: short}, config, f"{FC2}: codes of the rounded weight has shape"),
        (layers | {FC2: wild}, config, f"{FC2}: codes go from"),
        (layers, few, f"the quant config has no layer '{FC2}'"),
        (layers, odd, f"shift of {FC2} in the quant config has 5 channels"),
    ):
        with pytest.raises(UserError, match=words):
            inject(model, wrong, config=using)
    with pytest.raises(UserError, match="model_hash"):
        check_config(
            "quant_config.json", config_for(layers, model="tiny", model_hash="1"), "tiny", "2"
        )
    np.testing.assert_array_equal(velocity(pipeline, 0.5), before)
    inject(model, layers, config=config)
    with pytest.raises(UserError, match="no linear"):
        inject(model, layers, config=config)
