"""A saved model draws the same bytes, MLX's own layers read it, and a bad folder is one line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from src.errors import UserError
from src.generate import generate, write_picture
from src.inference.export import narrowed, save_model, save_transformer
from src.inference.modulation import quantize_modulation
from src.inference.saved import is_saved, load_saved, load_saved_transformer, open_pipeline
from src.metrics.fidelity import reference_trajectories, teacher_forced_sqnr
from src.models.configs import config_named
from src.models.load import load_pipeline
from src.models.mmdit import MMDiT
from src.models.paths import module_at
from src.models.pipeline import Pipeline
from src.quant.grid import dequantize
from src.quant.linear import QuantizedLinear
from src.quant.packing import unpack_codes
from src.store import load_tensors, save_tensors

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from .helpers import assert_one_error_line, run_here
from .quantized_models import quantized_pipeline
from .test_generate import pipeline_folder

PROMPT = "a large red star in the center on a night background"
FC1 = "multimodal_transformer_blocks.0.image_transformer_block.mlp.fc1"
FC2 = "multimodal_transformer_blocks.0.image_transformer_block.mlp.fc2"


def picture_of(pipeline: Pipeline, path: Path, **settings) -> bytes:
    """The bytes of the PNG that is drawn before saving."""
    latent = pipeline.sample([PROMPT], [3], num_steps=2, **settings)
    write_picture(path, pipeline.decode(latent)[0], prompt=PROMPT, seed=3, model=pipeline.name)
    return path.read_bytes()


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"a_scale": "token", "modulation": False},
        {"activations": False},
        {"weights_only": True, "smoothing": True},
        {"bits": 8, "group_size": 32, "smoothing": True},
        {"shifts": 10, "coarse": 2, "low_rank": 2, "smoothing": True},
        {"model": "tiny-3.5-medium"},
    ],
    ids=lambda how: "-".join(map(str, how)) or "W4A8",
)
def test_a_saved_model_draws_the_same_bytes(how, tmp_path):
    pipeline = quantized_pipeline(**how)
    wanted = picture_of(pipeline, tmp_path / "before.png")
    assert save_model(pipeline, tmp_path / "saved") == tmp_path / "saved"
    saved = str(tmp_path / "saved")
    (path,) = generate([PROMPT], tmp_path / "after.png", model=saved, seed=3, num_steps=2)
    assert path.read_bytes() == wanted
    assert picture_of(load_pipeline(pipeline.name), tmp_path / "float.png") != wanted


def test_saving_again_what_was_loaded_gives_the_same_files(tmp_path):
    save_model(quantized_pipeline(smoothing=True, shifts=10), tmp_path / "one")
    save_model(load_saved(tmp_path / "one"), tmp_path / "two")
    for name in ("model", "ditq", "text_encoder", "codec"):
        one, two = ((tmp_path / f / f"{name}.safetensors").read_bytes() for f in ("one", "two"))
        assert one == two, name


def mlx_lm_model(folder: Path) -> MMDiT:
    """As mlx-lm opens a folder: the table decides which layers are quantized and how."""
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    table = config["quantization"]
    weights = mx.load(str(folder / "model.safetensors"))
    model = MMDiT(config_named("tiny"))

    def predicate(path: str, module: nn.Module):
        return table[path] if path in table else f"{path}.scales" in weights

    kind = {k: table[k] for k in ("group_size", "bits", "mode")}
    nn.quantize(model, **kind, class_predicate=predicate)
    model.load_weights(list(weights.items()), strict=True)
    return model


@pytest.mark.parametrize("group_size", [0, 32])
def test_mlx_own_layers_read_the_folder(group_size, tmp_path):
    pipeline = quantized_pipeline(group_size=group_size, activations=False)
    model = mlx_lm_model(save_model(pipeline, tmp_path / "saved"))
    for path in (FC1, FC2):
        ours, theirs = (module_at(m, path) for m in (pipeline.transformer, model))
        assert isinstance(ours, QuantizedLinear) and isinstance(theirs, nn.QuantizedLinear)
        weight = np.array(dequantize(unpack_codes(ours.weight, 4), ours.scales))
        x = np.random.default_rng(0).standard_normal((5, weight.shape[1])).astype(np.float32)
        wanted = x @ weight.T + np.array(ours.bias)
        np.testing.assert_allclose(np.array(theirs(mx.array(x))), wanted, rtol=0, atol=1e-4)
        assert theirs.scales.dtype == mx.float32
        np.testing.assert_array_equal(np.array(theirs.biases), -8 * np.array(theirs.scales))
    inputs = mx.random.normal((1, 8, 8, 16)), mx.random.normal((1, 4, 32)), mx.zeros((1, 32))
    outputs = [np.array(m(*inputs, mx.array([500.0]))) for m in (pipeline.transformer, model)]
    np.testing.assert_allclose(*outputs, atol=1e-4 * np.abs(outputs[0]).max())


def test_the_folder_is_in_the_style_of_mlx_lm(tmp_path):
    settings = {"bits_w": 4, "rounding": "nearest"}
    folder = save_model(
        quantized_pipeline(), tmp_path / "saved", made_from={"weights": "ab12"}, settings=settings
    )
    raw = (folder / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"] == {"format": "mlx"}
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"]["bits"] == 4 and config["quantization"]["mode"] == "affine"
    modulation = "final_layer.adaLN_modulation.layers.1"
    assert config["quantization"][modulation] == {"group_size": 32, "bits": 8}
    assert config["ditq"]["made_from"]["model"] == "tiny"
    card = (folder / "README.md").read_text()
    for words in ("4-bit weights in 21 layers", "8-bit", "ditq generate", "| weights | ab12 |"):
        assert words in card, words
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]


def test_the_cards_python_runs(tmp_path, monkeypatch):
    folder = save_model(quantized_pipeline(), tmp_path / "saved")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code, names)
    assert names["layer"](mx.zeros((1, 64))).shape == (1, 64)


def test_sixteen_bit_weights_are_stored_in_sixteen_bits():
    values = mx.array([1.0, -0.1, 65504.0, 6e-8])
    for dtype in (mx.float16, mx.bfloat16):
        kept = values.astype(dtype)
        assert narrowed(kept.astype(mx.float32)).dtype == dtype
    for exact in (values, mx.array([1, 2])):
        assert narrowed(exact).dtype == exact.dtype


def test_kernels_agree_on_a_saved_model(tmp_path):
    save_model(quantized_pipeline(), tmp_path / "saved")
    latents = [
        open_pipeline(str(tmp_path / "saved"), kernel=kernel).sample([PROMPT], [0], num_steps=2)
        for kernel in (None, "reference", "quantized_matmul")
    ]
    for latent in latents[1:]:
        np.testing.assert_allclose(np.array(latent), np.array(latents[0]), atol=1e-4)


def test_a_transformer_alone_is_saved_and_loaded(tmp_path):
    transformer = quantized_pipeline().transformer
    folder = save_transformer(transformer, tmp_path / "saved", made_from={"model": "x"})
    inputs = mx.random.normal((1, 8, 8, 16)), mx.random.normal((1, 4, 32)), mx.zeros((1, 32))
    outputs = [m(*inputs, mx.array([500.0])) for m in (transformer, load_saved_transformer(folder))]
    assert mx.array_equal(*outputs)
    with pytest.raises(UserError, match="without text encoder and codec"):
        load_saved(folder)


def test_only_an_empty_place_or_force_is_written_to(tmp_path):
    pipeline = quantized_pipeline()
    target = tmp_path / "saved"
    target.mkdir()
    save_model(pipeline, target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    with pytest.raises(UserError, match="holds a saved model already; --force replaces it"):
        save_model(pipeline, target)
    assert before == {p.name: p.read_bytes() for p in target.iterdir()}
    save_model(quantized_pipeline(bits=8), target, force=True)
    assert json.loads((target / "config.json").read_text())["quantization"]["bits"] == 8
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(UserError, match="holds something else than a saved model"):
            save_model(pipeline, other, force=force)
    assert (other / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="is a file"):
        save_model(pipeline, other / "notes.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "saved"]


def test_nothing_is_left_of_a_save_that_failed(tmp_path):
    """What a killed save has left is cleared, too; a model without quantized layers is none."""
    (tmp_path / ".saved.partial").mkdir()
    pipeline = quantized_pipeline()
    with pytest.raises(UserError, match="no quantized layer"):
        save_model(load_pipeline("tiny"), tmp_path / "saved")
    with pytest.raises(TypeError):
        save_model(pipeline, tmp_path / "saved", settings={"odd": object()})
    assert not (tmp_path / "saved").exists()
    save_model(pipeline, tmp_path / "saved")
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_model(quantized_pipeline(), tmp_path_factory.mktemp("models") / "saved")


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def truncate(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-10])


def flip(folder: Path, name: str) -> None:
    raw = bytearray((folder / name).read_bytes())
    raw[-100] ^= 1
    (folder / name).write_bytes(raw)


DAMAGES = {
    "truncated": (lambda f: truncate(f, "model.safetensors"), ["model.safetensors", "bytes"]),
    "one bit": (lambda f: flip(f, "model.safetensors"), ["model.safetensors", "sha256"]),
    "own bit": (lambda f: flip(f, "ditq.safetensors"), ["ditq.safetensors", "sha256"]),
    "missing": (lambda f: (f / "codec.safetensors").unlink(), ["codec.safetensors is missing"]),
    "no json": (lambda f: (f / "config.json").write_text("{"), ["config.json", "not JSON"]),
    "version": (lambda f: edit(f, lambda c: c["ditq"].update(version=9)), ["version 9"]),
    "format": (lambda f: edit(f, lambda c: c["ditq"].pop("format")), ["format"]),
    "files": (lambda f: edit(f, lambda c: c["ditq"].pop("files")), ["what was saved"]),
    "outside": (
        lambda f: edit(
            f, lambda c: c["ditq"]["files"].update({"../x": {"bytes": 1, "sha256": ""}})
        ),
        ["'../x'", "out of its folder"],
    ),
    "table": (lambda f: edit(f, lambda c: c.pop("quantization")), ["config.json"]),
    "group": (lambda f: edit(f, lambda c: c["quantization"].update(bits=7)), ["bits 7"]),
    "shape": (
        lambda f: edit(f, lambda c: c["ditq"]["transformer"].update(hidden=128)),
        ["shape"],
    ),
    "depth": (lambda f: edit(f, lambda c: c["ditq"]["transformer"].update(depth=1)), ["no linear"]),
    "groups": (
        lambda f: edit(f, lambda c: c["ditq"]["layers"][FC2].update(groups=5)),
        ["5 groups", FC2],
    ),
    "layers": (lambda f: edit(f, lambda c: c["ditq"]["layers"].pop(FC2)), [FC2]),
    "sigmas": (
        lambda f: edit(f, lambda c: c["ditq"].update(sigmas=[0.1, 0.9])),
        ["config.json", "must fall"],
    ),
    "no sigmas": (
        lambda f: edit(f, lambda c: c["ditq"].update(sigmas=None)),
        ["broken", "10 steps"],
    ),
    "a_scale": (
        lambda f: edit(f, lambda c: c["ditq"].update(a_scale="row")),
        ["config.json", "'row'"],
    ),
    "sampling": (lambda f: edit(f, lambda c: c["ditq"].pop("sampling")), ["sampling"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_error_line(damage, saved, tmp_path):
    broken, (break_it, words) = tmp_path / "broken", DAMAGES[damage]
    shutil.copytree(saved, broken)
    break_it(broken)
    result = run_here(
        "src.generate", "--model", str(broken), "--prompt", PROMPT, "--output", "x.png",
        cwd=tmp_path,
    )  # fmt: skip
    assert_one_error_line(result, *words)
    assert not (tmp_path / "x.png").exists()


def test_folders_and_options_that_do_not_belong_together(saved, tmp_path):
    with pytest.raises(UserError, match="holds a quantized model"):
        load_pipeline(str(saved))
    pipeline_folder(tmp_path)
    assert is_saved(saved) and not is_saved(tmp_path)
    with pytest.raises(UserError, match="is not that of a model saved by this package"):
        load_saved(tmp_path)
    mlx_lm = tmp_path / "mlx_lm"
    mlx_lm.mkdir()
    save_tensors(mlx_lm / "model.safetensors", {"a.weight": mx.zeros((4, 4), dtype=mx.uint32)})
    (mlx_lm / "config.json").write_text('{"quantization": {"bits": 4, "group_size": 64}}')
    with pytest.raises(UserError, match="config.json"):
        open_pipeline(str(mlx_lm))
    with pytest.raises(UserError, match="--kernel dense is for saved quantized models"):
        open_pipeline("tiny", kernel="dense")
    with pytest.raises(UserError, match="unknown kernel 'fast'"):
        open_pipeline(str(saved), kernel="fast")


def test_steps_outside_the_calibrated_range_are_refused_before_sampling(saved, tmp_path):
    edit_to = tmp_path / "saved"
    shutil.copytree(saved, edit_to)
    edit(edit_to, lambda c: c["ditq"].update(sigmas=[0.5 - 0.01 * i for i in range(10)]))
    with pytest.raises(UserError, match="outside the calibrated range"):
        generate([PROMPT], tmp_path / "x.png", model=str(edit_to), num_steps=3)
    assert not (tmp_path / "x.png").exists()


def test_extra_tensors_are_refused(saved, tmp_path):
    """A folder whose hashes are right but whose tensors are of another model."""
    from src.store import hash_file

    odd = tmp_path / "odd"
    shutil.copytree(saved, odd)
    tensors = dict(load_tensors(odd / "model.safetensors"))
    mx.eval(tensors)
    save_tensors(odd / "model.safetensors", {**tensors, "stray.weight": mx.zeros((2,))})
    path = odd / "model.safetensors"
    entry = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    edit(odd, lambda c: c["ditq"]["files"].update({"model.safetensors": entry}))
    with pytest.raises(UserError, match="unexpected array 'stray.weight'"):
        load_saved(odd)


@pytest.mark.slow
def test_modulation_in_eight_bits_costs_less_than_weights_in_four():
    """nano's velocity keeps more than 45 dB, far above what 4-bit weights leave."""
    reference_model, rounded = load_pipeline("nano"), load_pipeline("nano")
    paths = quantize_modulation(rounded.transformer)
    assert len(paths) == 2 * 8 + 1 and not quantize_modulation(rounded.transformer)
    reference = reference_trajectories(reference_model, [PROMPT], num_steps=6)
    sqnr = teacher_forced_sqnr(rounded.transformer, reference)
    assert 45 < sqnr.mean() < math.inf
    names = dict(tree_flatten(rounded.transformer.parameters()))
    assert names["final_layer.adaLN_modulation.layers.1.scales"].dtype == mx.float16
