"""Checkpoints of any model to INT8: which layers, the file's format, memory, kills, bad input."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from src.conversion.format import BLOCK_SIZES, SCHEMES, Scheme, scheme_of
from src.conversion.layers import Selection, role
from src.conversion.plan import make_plan
from src.conversion.reading import SafetensorsSource, open_source
from src.conversion.work import PIECE_BYTES
from src.convert_to_int8 import convert_to_int8
from src.errors import UserError
from src.models.checkpoints import read_weights
from src.quant.grid import dequantize
from src.quant.int8_operators import INT8Quantizer
from src.quant.replace import QuantizationBlock, prepare_int8
from src.store import (
    TensorInfo,
    hash_arrays,
    load_tensors,
    read_header,
    save_folder,
    save_npz,
    save_tensors,
    stream_tensors,
)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from .checkpoint_names import FAMILIES, write_family, write_names
from .helpers import ROOT, assert_one_error_line, contents, run, run_here, start_quietly

STAGE = "src.convert_to_int8"
Q, FF, NORM = "blocks.0.attn.q_proj", "blocks.0.mlp.fc1", "blocks.0.norm1"
SMALL = {"min_features": 0}


def model(dtype: mx.Dtype = mx.bfloat16, columns: int = 256, seed: int = 0) -> dict[str, mx.array]:
    """Two layers to convert, one to keep, a bias and a table."""
    rng = np.random.default_rng(seed)

    def gaussian(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)

    return {
        f"{Q}.weight": gaussian(96, columns),
        f"{Q}.bias": gaussian(96),
        f"{FF}.weight": gaussian(64, columns),
        f"{NORM}.weight": gaussian(columns),
        "pos_table": gaussian(1, 7, 5),
        "ids": mx.arange(6),
    }


def written(folder: Path, **settings: object) -> dict[str, mx.array]:
    """The model's file converted, with its tensors read into memory."""
    source, output = folder / "in.safetensors", folder / "out.safetensors"
    save_tensors(source, model())
    convert_to_int8(source, output, quiet=True, **{**SMALL, **settings})
    return load_tensors(output)


def cosine(a: object, b: object) -> float:
    a, b = (np.array(x, dtype=np.float64).ravel() for x in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# Which layers


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_and_feed_forward_of_published_models_are_converted(tmp_path, name):
    """And nothing else is, each for its own reason."""
    family = FAMILIES[name]()
    path = tmp_path / "model.safetensors"
    write_names(path, family)
    plan = make_plan(SafetensorsSource(path, None), Selection())
    assert set(plan.converted) == {layer for layer, (_, why) in family.items() if why is None}
    for layer, (_, why) in family.items():
        if why is not None:
            assert why in plan.kept[layer], f"{layer}: {plan.kept[layer]}"
    assert len(plan.tensors) == len(family) + plan.other_tensors
    before, after = plan.converted_bytes
    assert after <= 0.52 * before


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("blocks.3.cross_attn.k_img", "cross-attention"),
        ("visual_transformer_blocks.1.cross_attention.to_key", "cross-attention"),
        ("multimodal_transformer_blocks.0.text_transformer_block.attn.o_proj", "attention"),
        ("transformer_blocks.0.ff_context.net.2", "feed-forward"),
        ("single_transformer_blocks.7.proj_out", "attention and feed-forward"),
        ("proj_out", None),
        ("conv_in", None),
        ("blocks.0.difference", None),
    ],
)
def test_the_role_of_a_layer_is_read_from_its_path(path, wanted):
    assert role(path) == wanted


def test_every_kept_layer_says_why(tmp_path):
    path = tmp_path / "a.safetensors"
    shapes = {
        "blocks.0.attn.q": (1024, 1024),
        "blocks.0.attn.narrow": (1024, 512),
        "blocks.0.attn.odd": (1024, 1100),
        "blocks.0.attn.skipped": (1024, 1024),
        "refiner.0.attn.q": (1024, 1024),
        "blocks.0.attn.ids": (1024, 1024),
        "blocks.0.something": (1024, 1024),
    }
    infos = {}
    for layer, shape in shapes.items():
        dtype, size = ("int32", 4) if layer.endswith("ids") else ("float16", 2)
        infos[f"{layer}.weight"] = TensorInfo(dtype, shape, size * shape[0] * shape[1])
    with stream_tensors(path, infos) as writer:
        for name, info in infos.items():
            writer.write(name, np.zeros(info.nbytes, np.uint8))
    plan = make_plan(
        SafetensorsSource(path, None), Selection(scope_attr="blocks", skip_keywords=("skip",))
    )
    assert plan.converted == ("blocks.0.attn.q",)
    assert plan.kept == {
        "blocks.0.attn.narrow": "under 1024 features",
        "blocks.0.attn.odd": "1100 in-features, not divisible by 128",
        "blocks.0.attn.skipped": "skip keyword skip",
        "refiner.0.attn.q": "outside of blocks",
        "blocks.0.attn.ids": "int32, not bfloat16, float16, float32",
        "blocks.0.something": "neither attention nor feed-forward",
    }
    wide = Selection(Scheme("per-channel"), min_features=0)
    assert {"blocks.0.attn.odd", "blocks.0.attn.narrow"} <= set(
        make_plan(SafetensorsSource(path, None), wide).converted
    )


# The file


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SCHEMES),
    st.sampled_from(BLOCK_SIZES),
    st.sampled_from([mx.bfloat16, mx.float16, mx.float32]),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_codes_and_scales_stand_for_the_weight(scheme, block_size, dtype, rows, blocks, seed):
    """Within half a step everywhere, with a full range in every block, zero blocks included."""
    rng = np.random.default_rng(seed)
    columns = blocks * block_size
    weight = rng.standard_normal((rows, columns)) * np.exp(rng.uniform(-5, 5, (rows, 1)))
    weight[rng.random(rows) < 0.2] = 0
    weight = mx.array(weight.astype(np.float32)).astype(dtype)
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "a.safetensors"), Path(folder, "b.safetensors")
        save_tensors(source, {"attn.q.weight": weight})
        convert_to_int8(source, output, block_size=block_size, scheme=scheme, quiet=True, **SMALL)
        found, metadata = load_tensors(output), read_header(output)[1]
        mx.eval(found)
    codes, scale = found["attn.q.weight"], found["attn.q.weight_scale"]
    per_row = blocks if scheme == "blockwise" else 1
    assert codes.dtype == mx.int8 and codes.shape == (rows, columns)
    assert scale.dtype == mx.float32 and scale.shape == (rows, per_row)
    if scheme == "blockwise":
        theirs = INT8Quantizer.quantize_blockwise(weight, block_size)
    else:
        theirs = INT8Quantizer.quantize_per_channel(weight)
    for ours, operators in zip((codes, scale), theirs, strict=True):
        np.testing.assert_array_equal(np.array(ours), np.array(operators))
    wanted = np.array(weight.astype(mx.float32)).reshape(rows, per_row, -1)
    got = np.array(dequantize(codes, scale)).reshape(wanted.shape)
    step = np.array(scale)[..., None]
    assert (np.abs(got - wanted) <= 0.5001 * step).all()
    largest = np.abs(np.array(codes).astype(int).reshape(wanted.shape)).max(axis=-1)
    assert (largest == np.where(np.abs(wanted).max(axis=-1) > 0, 127, 0)).all()
    assert scheme_of(metadata, "b") == Scheme(scheme, block_size if scheme == "blockwise" else 128)


def test_everything_else_keeps_its_name_and_its_bytes(tmp_path):
    found, wanted = written(tmp_path), model()
    converted = {f"{Q}.weight", f"{FF}.weight"}
    assert set(found) == set(wanted) | {f"{name}_scale" for name in converted}
    rest = set(wanted) - converted
    assert hash_arrays({n: found[n] for n in rest}) == hash_arrays({n: wanted[n] for n in rest})


def test_the_file_is_read_by_the_reference_library_and_keeps_its_metadata(tmp_path):
    source, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_tensors(source, model(mx.float16), {"format": "pt", "author": "me"})
    convert_to_int8(source, output, quiet=True, **SMALL)
    found = safetensors.numpy.load_file(output)
    assert found[f"{Q}.weight"].dtype == np.int8 and found[f"{Q}.weight_scale"].shape == (96, 2)
    metadata = read_header(output)[1]
    assert metadata["format"] == "pt" and metadata["author"] == "me"
    assert json.loads(metadata["ditq"]) == {
        "format": "ditq-int8",
        "version": 1,
        "scheme": "blockwise",
        "block_size": 128,
    }


def test_pieces_make_no_difference(tmp_path):
    """A layer of several pieces, the last one short, is what it is in one piece."""
    rows = 3 * PIECE_BYTES // (2 * 256) // 2 + 5
    weight = mx.random.normal((rows, 256), key=mx.random.key(0)).astype(mx.float16)
    save_tensors(tmp_path / "a.safetensors", {"attn.q.weight": weight})
    save_tensors(tmp_path / "b.safetensors", {"attn.q.weight": weight[-7:]})
    for name in "ab":
        convert_to_int8(
            tmp_path / f"{name}.safetensors", tmp_path / f"{name}8.safetensors", quiet=True, **SMALL
        )
    whole, end = (load_tensors(tmp_path / f"{name}8.safetensors") for name in "ab")
    for name in end:
        np.testing.assert_array_equal(np.array(whole[name][-7:]), np.array(end[name]))


def test_the_layouts_own_readers_read_a_converted_file(tmp_path):
    """A fused qkv is cut into codes and scales alike."""
    path, output = tmp_path / "sd3.safetensors", tmp_path / "int8.safetensors"
    write_family(path, FAMILIES["stability_sd3"]())
    convert_to_int8(path, output, quiet=True)
    plain, converted = read_weights(path), read_weights(output)
    linear = "multimodal_transformer_blocks.0.image_transformer_block.attn.k_proj"
    assert f"{linear}.weight" in plain
    stored = dequantize(converted[f"{linear}.weight"], converted[f"{linear}.weight_scale"])
    assert cosine(plain[f"{linear}.weight"].astype(mx.float32), stored) > 0.9999


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.RMSNorm(256), nn.Linear(256, 128)
        self.mlp = nn.Linear(128, 256, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.mlp(nn.gelu(self.attn(self.norm1(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = [Block() for _ in range(3)]

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("skipped", [(), ("blocks.1.mlp",)])
def test_a_converted_file_is_loaded_into_int8_layers(tmp_path, scheme, skipped):
    """Layers that were kept stay floats, though they are in the scope."""
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    network, loaded = Model(), Model()
    save_tensors(source, dict(tree_flatten(network.parameters())))
    convert_to_int8(
        source, output, scheme=scheme, skip_keywords=skipped, min_features=128, quiet=True
    )
    block = QuantizationBlock(enabled=True, checkpoint_is_quantized=True)
    paths = prepare_int8(loaded, block, output)
    assert len(paths) == 6 - len(skipped) and not set(skipped) & set(paths)
    x = mx.random.normal((4, 256), key=mx.random.key(1))
    assert cosine(network(x) - x, loaded(x) - x) > 0.999


# Every container gives the same file


def save_sharded(folder: Path) -> Path:
    save_folder(folder / "shards", model(mx.float32), max_shard_bytes=70_000)
    assert len(list((folder / "shards").iterdir())) > 2
    return folder / "shards"


def save_index(folder: Path) -> Path:
    return save_sharded(folder) / "model.safetensors.index.json"


def save_pipeline(folder: Path) -> Path:
    """diffusers' folder of a whole pipeline."""
    save_folder(folder / "pipe" / "transformer", model(mx.float32), stem="diffusion_pytorch_model")
    return folder / "pipe"


def save_numpy(folder: Path) -> Path:
    save_npz(folder / "a.npz", **{name: np.array(t) for name, t in model(mx.float32).items()})
    return folder / "a.npz"


def save_mlx_npz(folder: Path) -> Path:
    """mx.savez writes names with dots too; a transposed array is in Fortran order."""
    arrays = {name: np.array(t) for name, t in model(mx.float32).items()}
    arrays[f"{Q}.weight"] = np.asfortranarray(arrays[f"{Q}.weight"])
    np.savez_compressed(folder / "b.npz", **arrays)
    return folder / "b.npz"


@pytest.mark.parametrize(
    "save", [save_sharded, save_index, save_pipeline, save_numpy, save_mlx_npz]
)
def test_every_container_gives_the_same_bytes(tmp_path, save):
    single = tmp_path / "single.safetensors"
    save_tensors(single, model(mx.float32))
    convert_to_int8(single, tmp_path / "a8.safetensors", verify=True, quiet=True, **SMALL)
    convert_to_int8(save(tmp_path), tmp_path / "b8.safetensors", verify=True, quiet=True, **SMALL)
    assert (tmp_path / "a8.safetensors").read_bytes() == (tmp_path / "b8.safetensors").read_bytes()


def test_an_npz_in_bfloat16_gives_the_same_bytes(tmp_path):
    """MLX writes it as two bytes without a meaning, since npy has no name for it."""
    save_tensors(tmp_path / "a.safetensors", model())
    mx.savez(str(tmp_path / "b.npz"), **model())
    for name in ("a.safetensors", "b.npz"):
        output = tmp_path / f"{name[0]}8.safetensors"
        convert_to_int8(tmp_path / name, output, verify=True, quiet=True, **SMALL)
    assert (tmp_path / "a8.safetensors").read_bytes() == (tmp_path / "b8.safetensors").read_bytes()


@pytest.mark.sd3
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("old_format", [False, True])
def test_files_of_pytorch(tmp_path, dtype, old_format):
    torch = pytest.importorskip("torch")
    weight = torch.randn(96, 256).to(getattr(torch, dtype))
    state = {f"{Q}.weight": weight, f"{FF}.weight": weight.flip(0).t().contiguous().t()}
    saved = {"state_dict": state, "epoch": 3}
    path, output = tmp_path / "a.pt", tmp_path / "b.safetensors"
    torch.save(saved, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(UserError, match="--checkpoint_key .it has: state_dict"):
        convert_to_int8(path, output, quiet=True, **SMALL)
    convert_to_int8(path, output, checkpoint_key="state_dict", verify=True, quiet=True, **SMALL)
    found = load_tensors(output)
    for layer, wanted in ((Q, weight), (FF, weight.flip(0))):
        stored = dequantize(found[f"{layer}.weight"], found[f"{layer}.weight_scale"])
        assert cosine(wanted.float().numpy(), stored) > 0.9999
    with pytest.raises(UserError, match="no key 'ema'; it has: epoch, state_dict"):
        convert_to_int8(path, output, checkpoint_key="ema", quiet=True)
    again = tmp_path / "c.safetensors"
    torch.save({**{f"net.x.{name}": tensor for name, tensor in state.items()}, "epoch": 3}, path)
    convert_to_int8(path, again, checkpoint_key="net.x", quiet=True, **SMALL)
    assert again.read_bytes() == output.read_bytes()


@pytest.mark.sd3
@pytest.mark.parametrize("key", [None, "state_dict"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("to_sparse", "tensor z is of layout sparse_coo"),
        ("to_sparse_csr", "tensor z is of layout sparse_csr"),
        ("meta", "tensor z is of device meta, without numbers"),
        ("quantized", "tensor z is quantized by PyTorch"),
        ("nested", "tensor z is nested"),
        ("conj", "tensor z is a lazy conjugate"),
    ],
)
def test_tensors_of_pytorch_that_are_not_plain_are_named(tmp_path, kind, message, key):
    torch = pytest.importorskip("torch")
    make = {
        "meta": lambda: torch.empty(4, device="meta"),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "conj": lambda: torch.ones(4, dtype=torch.complex64).conj(),
    }
    odd = make[kind]() if kind in make else getattr(torch.eye(4), kind)()
    state = {f"{Q}.weight": torch.ones(96, 256), "z": odd}
    torch.save({key: state} if key else state, tmp_path / "a.pt")
    output = tmp_path / "b.safetensors"
    with pytest.raises(UserError, match=f"a.pt: {message}.*; valid: dense tensors.*; save it as"):
        convert_to_int8(tmp_path / "a.pt", output, checkpoint_key=key, quiet=True, **SMALL)
    assert not output.exists()


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is here")
def test_without_pytorch_its_files_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="a.pt is PyTorch's: install torch, or convert"):
        convert_to_int8(tmp_path / "a.pt", tmp_path / "b.safetensors")


@pytest.mark.sd3
def test_a_pytorch_file_with_code_in_it_is_not_run(tmp_path):
    torch = pytest.importorskip("torch")
    path, sign = tmp_path / "a.pt", tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(sign),))

    torch.save({"x": Evil()}, path)
    result = run_here(STAGE, "--input", str(path), "--output", str(tmp_path / "b.safetensors"))
    assert_one_error_line(result, "a.pt", "safely")
    assert not sign.exists()


@pytest.mark.sd3
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x80\x02}q\x00."])
def test_a_damaged_pytorch_file_is_one_error_line(tmp_path, content):
    pytest.importorskip("torch")
    (tmp_path / "a.pt").write_bytes(content)
    before = contents(tmp_path)
    result = run_here(STAGE, "--input", "a.pt", "--output", "b.safetensors", cwd=tmp_path)
    assert_one_error_line(result, "a.pt")
    assert contents(tmp_path) == before


@pytest.mark.sd3
def test_a_cut_off_pytorch_file_is_one_error_line(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({f"{Q}.weight": torch.ones(1024, 1024)}, tmp_path / "a.pt")
    os.truncate(tmp_path / "a.pt", (tmp_path / "a.pt").stat().st_size // 2)
    result = run_here(STAGE, "--input", "a.pt", "--output", "b.safetensors", cwd=tmp_path)
    assert_one_error_line(result, "a.pt", "save its state_dict again")


def test_what_is_below_a_key_is_taken_without_it(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {f"ema.net.{name}": tensor for name, tensor in model().items()}
    save_tensors(path, {**tensors, **model(seed=1)})
    convert_to_int8(path, tmp_path / "b.safetensors", checkpoint_key="ema.net", quiet=True, **SMALL)
    assert hash_arrays(load_tensors(tmp_path / "b.safetensors")) == hash_arrays(written(tmp_path))
    with pytest.raises(UserError, match="no key 'emo'; it has: blocks, ema, ids, pos_table"):
        convert_to_int8(path, tmp_path / "c.safetensors", checkpoint_key="emo", quiet=True)


# The command


def test_the_command_says_what_it_does(tmp_path):
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_tensors(source, {f"{i}.{name}": t for i in range(9) for name, t in model().items()})
    both = ("--input_checkpoint", str(source), "--output_checkpoint", str(output))
    result = run_here(STAGE, *both, "--min_features", "0", "--verify")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:2] == ["Found 18 layers to convert to INT8", "Keeping 9 layers"]
    assert re.fullmatch(r"Converted layers: 737.3 kB to 380.2 kB, 48.4% smaller", lines[2])
    assert re.fullmatch(r"Checkpoint: .* kB to .* kB, 4\d.\d% smaller", lines[3])
    worst, mean = re.search(r"worst cosine (\S+) \(.*\), mean (\S+)$", lines[4]).groups()
    assert 0.9999 < float(worst) <= float(mean) < 1
    assert re.match(rf"converted 18 layers to {re.escape(str(output))} in .* s, peak", lines[5])
    assert "converting: 100%" in result.stderr
    again = run_here(STAGE, *both, "--min_features", "0", "--quiet")
    assert_one_error_line(again, "out.safetensors exists", "--force")
    forced = run_here(STAGE, *both, "--min_features", "0", "--quiet", "--force")
    assert forced.returncode == 0 and not forced.stdout and not forced.stderr


def test_a_dry_run_lists_every_layer_and_writes_nothing(tmp_path):
    source = tmp_path / "in.safetensors"
    save_tensors(source, model())
    result = run_here(STAGE, "--input", str(source), "--dry-run", "--min_features", "80")
    lines = result.stdout.splitlines()
    assert lines[:4] == [
        f"convert  {Q}  96x256 bfloat16  attention",
        f"keep     {FF}  64x256 bfloat16  under 80 features",
        f"keep     {NORM}  256 bfloat16  norm",
        "copy     3 other tensors, such as biases and tables",
    ]
    assert "Found 1 layers to convert to INT8" in lines and "Keeping 2 layers" in lines
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_dry_run_lists_every_layer_where_none_would_be_converted(tmp_path):
    source = tmp_path / "in.safetensors"
    save_tensors(source, model())
    result = run_here(STAGE, "--input", str(source), "--dry-run", "--min_features", "1000")
    assert f"keep     {Q}  96x256 bfloat16  under 1000 features" in result.stdout.splitlines()
    assert result.returncode == 1 and result.stderr.startswith("error: ")
    assert "no layer to convert" in result.stderr


def test_keywords_come_with_commas_or_one_by_one(tmp_path):
    source = tmp_path / "in.safetensors"
    save_tensors(source, model())
    base = ("--input", str(source), "--dry-run", "--min_features", "0", "--skip_keywords")
    for words in (("absent,mlp",), ("absent", "--skip_keywords", "mlp")):
        lines = run_here(STAGE, *base, *words).stdout.splitlines()
        assert f"keep     {FF}  64x256 bfloat16  skip keyword mlp" in lines
    assert_one_error_line(run_here(STAGE, *base, "mlp,"), "empty word")


# Bad input


def flip_to_nan(path: Path, name: str) -> None:
    info = read_header(path)[0][name]
    with open(path, "r+b") as file:
        file.seek(info.start + info.nbytes - 2)
        file.write(b"\xff\x7f")


def raw_file(header: str, payload: int) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + bytes(payload)


ENTRY = '{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]}'
LIE = '{"dtype":"F16","shape":[9,2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (raw_file(f'{{"a.weight":{ENTRY}}}', 7), ["is damaged", "end at byte 8 of 7"]),
        (raw_file(f'{{"a.weight":{LIE}}}', 8), ["is damaged", "needs 36 bytes"]),
        (raw_file(f'{{"a.weight":{ENTRY},"a.weight":{ENTRY}}}', 8), ["'a.weight' is there twice"]),
        (b"", ["is damaged"]),
        (raw_file(f'{{"attn.q":{ENTRY}}}', 8), ["no layer to convert"]),
        (raw_file(f'{{"attn.q.weight":{ENTRY}}}', 8), ["under 1024 features", "--min_features"]),
    ],
)
def test_a_damaged_file_is_one_error_line(tmp_path, content, words):
    (tmp_path / "in.safetensors").write_bytes(content)
    before = contents(tmp_path)
    result = run_here(
        STAGE,
        "--input",
        str(tmp_path / "in.safetensors"),
        "--output",
        str(tmp_path / "o.safetensors"),
    )
    assert_one_error_line(result, "in.safetensors", *words)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", [f"{Q}.weight", f"{NORM}.weight"])
def test_nan_is_named_and_nothing_is_written(tmp_path, name):
    source = tmp_path / "in.safetensors"
    save_tensors(source, model())
    flip_to_nan(source, name)
    before = contents(tmp_path)
    output = str(tmp_path / "out.safetensors")
    result = run_here(
        STAGE, "--input", str(source), "--output", output, "--min_features", "0", "--quiet"
    )
    assert_one_error_line(result, "in.safetensors", f"tensor {name} has NaN or infinity")
    assert contents(tmp_path) == before


def test_a_quantized_input_is_refused(tmp_path):
    written(tmp_path)
    with pytest.raises(UserError, match="out.safetensors is quantized already .INT8, blockwise"):
        convert_to_int8(tmp_path / "out.safetensors", tmp_path / "b.safetensors", **SMALL)
    codes, scales, biases = mx.quantize(mx.zeros((1024, 1024)))
    save_tensors(
        tmp_path / "mlx.safetensors",
        {"attn.q.weight": codes, "attn.q.scales": scales, "attn.q.biases": biases},
    )
    with pytest.raises(UserError, match="mlx.safetensors is quantized already .it has attn.q"):
        convert_to_int8(tmp_path / "mlx.safetensors", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_the_input_is_never_the_output(tmp_path):
    source, link = tmp_path / "in.safetensors", tmp_path / "link.safetensors"
    save_tensors(source, model())
    link.symlink_to(source)
    folder = save_sharded(tmp_path)
    shard = min(folder.glob("*.safetensors"))
    before = contents(tmp_path)
    for origin, output in ((source, source), (source, link), (folder, shard)):
        with pytest.raises(UserError, match="is the input"):
            convert_to_int8(origin, output, force=True, quiet=True, **SMALL)
    assert contents(tmp_path) == before and link.is_symlink()


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    folder = save_sharded(tmp_path)
    save_tensors(tmp_path / "secret.safetensors", {"attn.q.weight": mx.zeros((8, 8))})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"attn.q.weight": "../secret.safetensors"}}))
    for origin in (folder, index):
        with pytest.raises(UserError, match="may lead out of its folder|is not the name"):
            convert_to_int8(origin, tmp_path / "o.safetensors", **SMALL)


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model.fp16", "flux"])
@pytest.mark.parametrize("left", [1, 2])
def test_shards_without_their_index_are_no_model(tmp_path, stem, left):
    """Nor is one of them, which would be half a model."""
    names = save_folder(tmp_path / "a", model(mx.float32), max_shard_bytes=70_000, stem=stem)
    for name in names[left:]:
        (tmp_path / "a" / name).unlink()
    index = rf"{re.escape(stem)}\.safetensors\.index\.json"
    with pytest.raises(UserError, match=f"{index} is missing beside its shards; copy it here"):
        convert_to_int8(tmp_path / "a", tmp_path / "b.safetensors", quiet=True, **SMALL)
    assert not (tmp_path / "b.safetensors").exists()


def test_shards_of_any_name_are_found_by_their_index(tmp_path):
    save_folder(tmp_path / "a", model(), max_shard_bytes=70_000, stem="flux")
    (tmp_path / "one").mkdir()
    save_tensors(tmp_path / "one" / "flux-00001-of-00001.safetensors", model())
    for name in ("a", "one"):
        convert_to_int8(tmp_path / name, tmp_path / f"{name}.safetensors", quiet=True, **SMALL)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    folder = save_sharded(tmp_path)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_tensors(second, {**load_tensors(first), **load_tensors(second)})
    with pytest.raises(UserError, match="against its index .* it also has"):
        convert_to_int8(folder, tmp_path / "o.safetensors", **SMALL)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"block_size": 100}, "block size 100 is not possible; valid: 32, 64, 128"),
        ({"scheme": "diagonal"}, "unknown scheme 'diagonal'; valid: blockwise, per-channel"),
        ({"scope_attr": "layers"}, "no layers under scope_attr 'layers'; .* under blocks"),
        ({"min_features": -1}, "min_features must be 0 or more"),
        ({"output_checkpoint": "out.npz"}, r"out.npz is no name .* \.safetensors"),
        ({"output_checkpoint": None}, "--output_checkpoint"),
        ({"input_checkpoint": "absent.safetensors"}, "absent.safetensors does not exist; give"),
        ({"input_checkpoint": "a.txt"}, "a.txt is no checkpoint that is read here; give"),
        ({"input_checkpoint": "a.npz"}, "a.npz is damaged: not a sound npz file"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_way_out(tmp_path, given, message):
    save_tensors(tmp_path / "in.safetensors", model())
    for name in ("a.txt", "a.npz"):
        (tmp_path / name).write_text("hello")
    settings = {
        "input_checkpoint": tmp_path / "in.safetensors",
        "output_checkpoint": tmp_path / "out.safetensors",
        "quiet": True,
        **SMALL,
    }
    for name, value in given.items():
        settings[name] = tmp_path / value if name.startswith(("in", "out")) and value else value
    with pytest.raises(UserError, match=message):
        convert_to_int8(**settings)
    assert not (tmp_path / "out.safetensors").exists()


def test_metadata_of_another_kind_is_told_from_ours():
    assert scheme_of({"format": "pt"}, "a") is None
    for text in ("", "[]", "1", '{"format":"ditq-int8","version":2}', '{"format":"other"}'):
        with pytest.raises(UserError, match="of a format this program does not read"):
            scheme_of({"ditq": text}, "a")


# Processes: a full disk, little memory, kills

IN_A_PROCESS = """
import re, resource, sys
from pathlib import Path
from src.convert_to_int8 import main
if sys.argv[1] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
try:
    main.main(sys.argv[2:])
finally:
    status = Path("/proc/self/status")
    print(re.search(r"VmHWM:\\s*(\\d+) kB", status.read_text())[1] if status.exists() else 0)
"""


def in_a_process(*arguments: str, before: str = "") -> subprocess.CompletedProcess:
    """Prints the peak of its own memory, in kilobytes, at its end."""
    command = [sys.executable, "-c", f"{before}\n{IN_A_PROCESS}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def big_checkpoint(path: Path, layers: int, rows: int) -> int:
    """A file of so many layers of (rows, 4096) in bfloat16; the bytes of one."""
    piece = (
        np.random.default_rng(0).standard_normal(2**20, np.float32).view(np.uint32) >> 16
    ).astype(np.uint16)
    info = TensorInfo("bfloat16", (rows, 4096), rows * 4096 * 2)
    tensors = {f"blocks.{i}.attn.q.weight": info for i in range(layers)}
    with stream_tensors(path, tensors) as writer:
        for name in tensors:
            for begin in range(0, info.nbytes // 2, piece.size):
                writer.write(name, piece[: info.nbytes // 2 - begin])
    return info.nbytes


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(tmp_path):
    source = tmp_path / "in.safetensors"
    big_checkpoint(source, layers=4, rows=1024)
    before = contents(tmp_path)
    files = ("--input", str(source), "--output", str(tmp_path / "out.safetensors"))
    result = in_a_process("9000000", *files, "--quiet")
    assert_one_error_line(result, "cannot write", "out.safetensors", "choose a folder")
    assert contents(tmp_path) == before


@pytest.mark.sd3
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layers", [8, 24])
def test_memory_does_not_grow_with_a_pytorch_file(tmp_path, layers):
    """Mapped, so that the bound holds on top of what PyTorch itself takes."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pt"
    weight = torch.randn(4096, 4096).to(torch.bfloat16)
    torch.save({f"blocks.{i}.attn.q.weight": weight.clone() for i in range(layers)}, path)
    peaks = []
    for command in ("--help", "--quiet"):
        files = ("--input", str(path), "--output", str(tmp_path / "b.safetensors"))
        result = in_a_process("0", *files, command, before="import torch")
        assert result.returncode == 0, result.stderr
        peaks.append(1024 * int(result.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 2 * weight.nbytes + 200 * 10**6
    assert peaks[1] - peaks[0] < 4 * weight.nbytes  # whatever the file's size


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("container", ["safetensors", "npz"])
def test_memory_does_not_grow_with_the_file(tmp_path, container):
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    layer = big_checkpoint(source, layers=16, rows=6144)
    assert source.stat().st_size > 800 * 10**6
    allowed = 2 * layer + 200 * 10**6
    if container == "npz":
        weight = np.zeros((6144, 2048), np.float32)
        weight[:, ::7] = 1
        source = tmp_path / "in.npz"
        np.savez(source, **{f"blocks.{i}.attn.q.weight": weight for i in range(16)})
    result = in_a_process("0", "--input", str(source), "--output", str(output), "--verify")
    assert result.returncode == 0, result.stderr
    assert 1024 * int(result.stdout.split()[-1]) < allowed


def kill_when_grown(command: list[str], folder: Path, size: int) -> bool:
    """Kills the command when a file of that many bytes lies in the folder; whether in time."""
    process = start_quietly(command)
    while process.poll() is None:
        # It may be renamed between two looks.
        with suppress(FileNotFoundError):
            if any(path.stat().st_size >= size for path in folder.glob(".*")):
                os.kill(process.pid, signal.SIGKILL)
                break
        time.sleep(0.002)
    return process.wait() != 0


@pytest.mark.slow
def test_a_kill_leaves_no_output_or_the_whole_one(tmp_path):
    source, output = tmp_path / "in.safetensors", tmp_path / "out" / "out.safetensors"
    big_checkpoint(source, layers=6, rows=4096)
    untouched = source.read_bytes()
    command = [sys.executable, "-m", STAGE, "--input", str(source), "--output", str(output)]
    assert start_quietly(command).wait() == 0
    whole = output.read_bytes()
    output.unlink()
    cut_short = 0
    for share in (0, 0.2, 0.5, 0.8, 0.95, 1, 1):
        cut_short += kill_when_grown(command, output.parent, int(share * len(whole)))
        if output.exists():
            assert output.read_bytes() == whole
            output.unlink()
        # What the killed run left is removed by the next.
        assert len(list(output.parent.iterdir())) <= 1
    assert cut_short >= 4
    assert run(STAGE, "--input", str(source), "--output", str(output)).returncode == 0
    assert contents(output.parent) == {output.name: whole}
    assert source.read_bytes() == untouched


@pytest.mark.slow
@pytest.mark.parametrize("start", [(STAGE,), ("src.cli", "convert-to-int8")])
def test_ctrl_c_leaves_nothing_and_does_not_say_that_something_is_kept(tmp_path, start):
    source, output = tmp_path / "in.safetensors", tmp_path / "out" / "out.safetensors"
    big_checkpoint(source, layers=8, rows=4096)
    process = subprocess.Popen(
        [sys.executable, "-m", *start, "--input", str(source), "--output", str(output), "--quiet"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # What was started in a shell's background is deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not list(output.parent.glob(".*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = filter(None, errors.splitlines())
    assert line.startswith("stopped; no file is half written; run the same command again")
    assert list(output.parent.iterdir()) == []


def test_a_source_tells_its_tensors_in_the_order_of_the_disk(tmp_path):
    save_tensors(tmp_path / "a.safetensors", model())
    with open_source(tmp_path / "a.safetensors") as source:
        starts = [info.start for info in source.tensors.values()]
    assert starts == sorted(starts)
