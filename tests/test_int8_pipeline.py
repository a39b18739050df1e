"""INT8 in the commands: one block, one function, the same pictures whichever way it came."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from src.convert_to_int8 import convert_to_int8
from src.errors import UserError
from src.evaluation.sources import Order
from src.generate import generate
from src.inference.int8 import Int8, int8_layers, open_with_int8, reread_of, sixteen_bit_self
from src.models.load import NANO, load_pipeline
from src.models.paths import BLOCKS, block_linears
from src.store import load_tensors, save_tensors

import mlx.core as mx
import numpy as np
import pytest

from .checkpoint_layouts import to_stability
from .helpers import assert_one_error_line, relative_error, run_here

PROMPT = "a large red star in the center on a night background"
SIXTEEN = NANO / "transformer.safetensors"
BLOCK = {"enabled": True, "scope_attr": BLOCKS, "skip_keywords": ["adaLN_modulation"]}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """nano's transformer as the converter writes it, a scale for each output."""
    path = tmp_path_factory.mktemp("converted") / "nano-int8.safetensors"
    convert_to_int8(SIXTEEN, path, scheme="per-channel", min_features=1, quiet=True)
    return path


@pytest.fixture(scope="module")
def latent() -> np.ndarray:
    """What `--use_int8` draws."""
    return drawn(Int8(use_int8=True))


def drawn(int8: Int8, model: str = "nano", **how) -> np.ndarray:
    pipeline = open_with_int8(model, int8=int8, tell=lambda line: None, **how)
    return np.array(pipeline.sample([PROMPT], [0], num_steps=2))


def write(path: Path, **block) -> Path:
    path.write_text(json.dumps({"quantization": block}))
    return path


def own_folder(tmp_path: Path, converted: Path) -> Path:
    """A pipeline whose own transformer is a converted file."""
    folder = tmp_path / "nano-int8"
    shutil.copytree(NANO, folder)
    shutil.copy(converted, folder / "transformer.safetensors")
    return folder


def test_off_unless_it_is_asked_for(tmp_path):
    for int8 in (Int8(), Int8(write(tmp_path / "a.json")), Int8({"model": "nano"})):
        pipeline = open_with_int8("nano", int8=int8)
        assert int8_layers(pipeline.transformer) == []
        assert pipeline.hash == load_pipeline("nano").hash


@pytest.mark.slow
def test_every_way_to_int8_gives_the_same_picture(tmp_path, converted, latent):
    exact = np.array(load_pipeline("nano").sample([PROMPT], [0], num_steps=2))
    assert 0 < relative_error(latent, exact) < 0.05
    ways = [
        Int8(write(tmp_path / "a.json", **BLOCK)),
        Int8({"quantization": {**BLOCK, "scope_attr": "blocks"}}),
        Int8({"quantization": BLOCK}, use_int8=True),
        Int8(int8_checkpoint=converted),
        Int8({"quantization": {**BLOCK, "checkpoint_is_quantized": True}}, False, converted),
    ]
    for int8 in ways:
        np.testing.assert_array_equal(drawn(int8), latent)
    np.testing.assert_array_equal(drawn(Int8(), str(own_folder(tmp_path, converted))), latent)


def test_the_layers_that_the_converter_takes_are_int8_and_no_others():
    lines = []
    model = open_with_int8("nano", int8=Int8(use_int8=True), tell=lines.append).transformer
    wanted = list(block_linears(load_pipeline("nano").transformer))
    assert sorted(int8_layers(model)) == sorted(wanted)
    assert lines == [f"quantized {len(wanted)} layers to INT8 while loading"]


def test_a_yaml_file_drives_a_command(tmp_path):
    pytest.importorskip("yaml")
    (tmp_path / "int8.yaml").write_text(f"quantization:\n  enabled: true\n  scope_attr: {BLOCKS}\n")
    result = run_here(
        "src.generate", "--model", "tiny", "--steps", "1", "--prompt", PROMPT,
        "--quantization", "int8.yaml", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0 and "quantized 25 layers to INT8" in result.stdout


@pytest.mark.slow
def test_a_converted_file_is_announced(tmp_path, converted):
    for option in ("--int8_checkpoint", "--int8-checkpoint"):
        result = run_here(
            "src.generate", "--steps", "1", "--prompt", PROMPT, option, str(converted), cwd=tmp_path
        )
        assert "loading pre-quantized INT8 checkpoint" in result.stdout, result.stderr
    folder = str(own_folder(tmp_path, converted))
    result = run_here(
        "src.generate", "--model", folder, "--steps", "1", "--prompt", PROMPT, cwd=tmp_path
    )
    assert "loading pre-quantized INT8 checkpoint" in result.stdout, result.stderr
    short = (
        "--num-steps",
        "1",
        "--repeats",
        "1",
        "--warm-up",
        "0",
        "--kernel",
        "unpack",
        "--force",
    )
    given = ("--model", "nano", "--int8_checkpoint", str(converted))
    result = run_here("src.benchmark", *given, *short, cwd=tmp_path)
    assert "loading pre-quantized INT8 checkpoint" in result.stdout, result.stderr
    result = run_here("src.benchmark", "--model", folder, *short, cwd=tmp_path)
    assert_one_error_line(result, "transformer.safetensors is INT8", "--int8_checkpoint")


def test_kernels_by_name_give_the_same_on_a_cpu(latent):
    np.testing.assert_array_equal(drawn(Int8(use_int8=True), kernel="fallback"), latent)
    with pytest.raises(UserError, match="unknown backend 'int5'; valid: auto, fallback"):
        drawn(Int8(use_int8=True), kernel="int5")


def test_no_two_copies_of_the_model_while_it_is_quantized(tmp_path):
    """Of the 16-bit weights one layer at a time is read, and let go."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    pipeline = open_with_int8("nano", int8=Int8(use_int8=True), tell=lambda line: None)
    peak = mx.get_peak_memory() - before
    model = pipeline.transformer
    codes = sum(
        tensor.nbytes
        for path in int8_layers(model)
        for tensor in parameters_at(model, path)
        if tensor.dtype in (mx.int8, mx.float32)
    )
    largest = 768 * 192 * (4 + 4 + 4 + 2)  # floats of a layer while its codes are made
    assert peak < codes + 2 * largest


def parameters_at(model, path: str) -> list[mx.array]:
    module = dict(model.named_modules())[path]
    return [module.weight, module.weight_scale]


def test_names_of_other_layouts_are_known(tmp_path):
    """A converted file of Stability's names, q, k and v fused."""
    tiny = load_pipeline("tiny").transformer
    published = to_stability(tiny)
    save_tensors(tmp_path / "a.safetensors", published)
    convert_to_int8(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors",
        scheme="per-channel", min_features=1, quiet=True,
    )  # fmt: skip
    got = drawn(Int8(int8_checkpoint=tmp_path / "b.safetensors"), "tiny")
    np.testing.assert_array_equal(got, drawn(Int8(use_int8=True), "tiny"))


@pytest.mark.slow
def test_an_evaluation_compares_with_the_sixteen_bit_self(tmp_path, converted):
    assert sixteen_bit_self("nano", Int8(use_int8=True)) == "nano"
    assert sixteen_bit_self("nano", Int8(int8_checkpoint=converted)) == "nano"
    assert sixteen_bit_self("nano") is None
    assert sixteen_bit_self(str(own_folder(tmp_path, converted))) is None
    result = run_here(
        "src.evaluate", "--model", "nano", "--use-int8", "--num-images", "2", "--num-steps", "2",
        "--no-fid", "--output", "evaluation", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (report,) = (tmp_path / "evaluation").glob("*.json")
    text = report.read_text()
    assert '"INT8 layers": 93' in text and '"INT8 layers": 0' in text
    order = Order(num_images=1, int8=Int8(use_int8=True))
    hashes = {o.open("nano", 0).pipeline.hash for o in (order, Order(num_images=1))}
    assert len(hashes) == 2


@pytest.mark.parametrize(
    "int8, message",
    [
        (Int8(use_int8=True, int8_checkpoint="a.safetensors"), "quantized already; give one of"),
        (
            Int8({"quantization": {"checkpoint_is_quantized": True}}, True),
            "checkpoint_is_quantized: true; leave one of them out",
        ),
        (
            Int8({"quantization": {}}, False, "a.safetensors"),
            "--int8_checkpoint is given, and the block does not say enabled: true",
        ),
        (
            Int8({"quantization": {**BLOCK, "enabled": False}}, True),
            "--use_int8 is given, and the block does not say enabled: true; say it, or leave one",
        ),
        (Int8({"quantization": {"enabled": 1}}), "quantization.enabled is 1; valid: true or false"),
        (
            Int8({"quantization": {**BLOCK, "checkpoint_is_quantized": True}}, False, SIXTEEN),
            "no INT8 codes .* say checkpoint_is_quantized: false",
        ),
        (
            Int8(int8_checkpoint=SIXTEEN),
            "no INT8 codes .* convert it with `python -m src.convert_to_int8`, or give --use_int8",
        ),
        (Int8("a.toml"), "valid endings: .json, .yaml, .yml"),
        (Int8("missing.json"), "missing.json"),
        (Int8(int8_checkpoint="missing.safetensors"), "missing.safetensors does not exist"),
        (Int8({"quantization": {**BLOCK, "skip_keywords": ["attn", "mlp", "ada"]}}), "all .* have"),
        (
            Int8({"quantization": {**BLOCK, "checkpoint_is_quantized": True}}),
            "transformer.safetensors: the checkpoint has no INT8 codes",
        ),
    ],
)
def test_contradictions_and_bad_files_are_refused(tmp_path, monkeypatch, int8, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        open_with_int8("nano", int8=int8)


def test_files_of_another_kind_are_one_error_line(tmp_path, converted):
    def error(*options: str, stage: str = "src.generate") -> None:
        given = [*options[:-1]]
        result = run_here(stage, "--prompt", PROMPT, *given, cwd=tmp_path)
        assert_one_error_line(result, options[-1])
        assert not list(tmp_path.glob("*.png"))

    error("--int8_checkpoint", str(SIXTEEN), "python -m src.convert_to_int8")
    error("--int8_checkpoint", str(converted), "--model", "tiny", "nano-int8.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(converted.read_bytes()[:-1000])
    error("--int8_checkpoint", "cut.safetensors", "cut.safetensors is damaged")
    tensors = load_tensors(converted)
    path = f"{BLOCKS}.3.image_transformer_block.mlp.fc1"
    tensors[f"{path}.weight_scale"] = tensors[f"{path}.weight_scale"][:, :0]
    save_tensors(tmp_path / "scales.safetensors", tensors)
    error("--int8_checkpoint", "scales.safetensors", f"{path}.weight_scale")
    folder = own_folder(tmp_path, converted)
    error("--model", str(folder), "--use_int8", "leave --use_int8 out, or give the file as --int8")
    off = str(write(tmp_path / "off.json"))
    error("--model", str(folder), "--quantization", off, "does not say enabled: true")


def test_nan_weights_are_named(tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(NANO, folder)
    tensors = load_tensors(folder / "transformer.safetensors")
    name = f"{BLOCKS}.2.text_transformer_block.attn.k_proj.weight"
    tensors[name][5, 7] = mx.nan
    mx.eval(tensors)
    save_tensors(folder / "transformer.safetensors", tensors)
    result = run_here(
        "src.generate", "--model", "nan", "--use_int8", "--prompt", PROMPT, cwd=tmp_path
    )
    assert_one_error_line(result, "nan", name.removesuffix(".weight"), "NaN or infinity")


def test_saved_and_rounded_models_refuse_int8(tmp_path):
    from src.inference.export import save_model

    from .quantized_models import quantized_pipeline

    save_model(quantized_pipeline(), tmp_path / "saved")
    result = run_here(
        "src.generate", "--model", "saved", "--use_int8", "--prompt", PROMPT, cwd=tmp_path
    )
    assert_one_error_line(result, "saved", "4-bit codes", "16 bits")
    result = run_here("src.load_adaround_model", "--use_int8", "--prompt", PROMPT, cwd=tmp_path)
    assert_one_error_line(result, "weight track", "enabled: false", "ditq generate")


@pytest.mark.slow
def test_low_memory_goes_with_int8(tmp_path):
    int8 = Int8(use_int8=True)
    one, two = (
        generate([PROMPT], tmp_path / "x.png", num_steps=2, int8=int8, low_memory=low)[0]
        .read_bytes()
        for low in (False, True)
    )  # fmt: skip
    assert one == two


def test_what_is_read_again_is_what_the_model_has(converted, tmp_path):
    for int8 in (Int8(), Int8(int8_checkpoint=converted)):
        tensors = reread_of("nano", int8)()
        model = open_with_int8("nano", int8=int8, tell=lambda line: None).transformer
        path = f"{BLOCKS}.7.image_transformer_block.mlp.fc2"
        held = dict(model.named_modules())[path]
        np.testing.assert_array_equal(
            np.array(held.weight).astype(np.float32),
            np.array(tensors[f"{path}.weight"]).astype(np.float32),
        )
    assert reread_of("nano", Int8(use_int8=True)) is None and reread_of("tiny") is None


def test_a_saved_model_is_read_again_from_its_folder(tmp_path):
    from src.inference.export import save_model

    from .quantized_models import quantized_pipeline

    pipeline = quantized_pipeline()
    save_model(pipeline, tmp_path / "saved")
    tensors = reread_of(str(tmp_path / "saved"))()
    path = f"{BLOCKS}.0.image_transformer_block.mlp.fc1"
    assert tensors[f"{path}.weight"].dtype == mx.uint32


def test_a_converted_folder_is_hashed_wherever_its_files_lie(tmp_path):
    """As the tensors are found in transformer/ too."""
    tiny = load_pipeline("tiny").transformer
    save_tensors(tmp_path / "a.safetensors", to_stability(tiny))
    hashes = set()
    for scheme in ("per-channel", "blockwise"):
        folder = tmp_path / scheme / "transformer"
        folder.mkdir(parents=True)
        convert_to_int8(
            tmp_path / "a.safetensors", folder / "model.safetensors",
            scheme=scheme, min_features=1, quiet=True,
        )  # fmt: skip
        int8 = Int8(int8_checkpoint=folder.parent)
        hashes.add(open_with_int8("tiny", int8=int8, tell=lambda line: None).hash)
    assert len(hashes) == 2
