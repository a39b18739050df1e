"""safetensors files, shards and their index."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from src.errors import UserError
from src.store import (
    TensorInfo,
    hash_arrays,
    load_folder,
    load_tensors,
    read_header,
    save_folder,
    save_tensors,
)

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
dtypes = st.sampled_from(["bool", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "c8"])
arrays = dtypes.flatmap(lambda dtype: hnp.arrays(np.dtype(dtype), shapes))
names = st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable())


def model(seed: int = 0) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    return {
        "b.weight": mx.array(rng.standard_normal((8, 4)), mx.bfloat16),
        "a.scales": mx.array(rng.standard_normal(5), mx.float32),
        "a.codes": mx.array(rng.integers(-8, 8, (3, 5)), mx.int8),
        "c": mx.array(rng.standard_normal((4, 4)), mx.float16).T,
        "empty": mx.zeros((0, 3)),
        "scalar": mx.array(2.5),
    }


def assert_same(found: dict[str, mx.array], wanted: dict[str, mx.array]) -> None:
    assert hash_arrays(found) == hash_arrays(wanted)


def raw_file(header: object, payload: int = 8) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(payload)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(names, arrays, max_size=5))
def test_round_trip_here_and_in_the_reference_library(data):
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "a.safetensors"), Path(folder, "b.safetensors")
        save_tensors(first, data)
        save_tensors(second, {name: mx.array(data[name]) for name in reversed(data)})
        assert first.read_bytes() == second.read_bytes()
        loaded = load_tensors(first)
        assert_same(loaded, data)
        plain = {name: array for name, array in data.items() if array.dtype != np.complex64}
        save_tensors(second, plain)
        for name, array in safetensors.numpy.load_file(second).items():
            np.testing.assert_array_equal(array, plain[name])
        mx.save_safetensors(str(second), {n: mx.array(a) for n, a in data.items()})
        assert_same(load_tensors(second), data)


def test_header_tells_dtypes_shapes_and_sizes_and_the_data_is_aligned(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, model())
    infos, metadata = read_header(path)
    assert metadata == {"format": "mlx"}
    assert infos["b.weight"] == TensorInfo("bfloat16", (8, 4), 64)
    assert infos["scalar"] == TensorInfo("float32", (), 4)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    for name, info in json.loads(raw[8 : 8 + length]).items():
        if name in infos and infos[name].nbytes:
            itemsize = infos[name].nbytes // int(np.prod(infos[name].shape))
            assert info["data_offsets"][0] % itemsize == 0
    save_tensors(path, model(), metadata={"b": "2", "a": "1"})
    assert read_header(path)[1] == {"a": "1", "b": "2"}


@pytest.mark.parametrize("limit", [1, 40, 100, 10**9])
def test_shards_of_any_size_hold_the_same_model(tmp_path, limit):
    names = save_folder(tmp_path, model(), max_shard_bytes=limit)
    assert sorted(names) == sorted(p.name for p in tmp_path.iterdir())
    assert_same(load_folder(tmp_path), model())
    if limit == 10**9:
        assert names == ["model.safetensors"]
        return
    assert names[0] == f"model-00001-of-{len(names) - 1:05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model().values())
    for name, shard in index["weight_map"].items():
        infos, metadata = read_header(tmp_path / shard)
        assert name in infos and metadata == {"format": "mlx"}
        assert len(infos) == 1 or sum(info.nbytes for info in infos.values()) <= limit


def test_a_newer_save_leaves_no_shard_of_an_older_one(tmp_path):
    (tmp_path / "model-card.safetensors").write_bytes(b"mine")
    for seed, limit in enumerate([40, 10**9, 100, 40]):
        names = save_folder(tmp_path, model(seed), max_shard_bytes=limit)
        assert_same(load_folder(tmp_path), model(seed))
        assert {p.name for p in tmp_path.iterdir()} == {*names, "model-card.safetensors"}


def test_an_interrupted_sharded_save_never_mixes_two_models(tmp_path):
    names = save_folder(tmp_path, model(0), max_shard_bytes=40)
    (tmp_path / names[1]).unlink()
    (tmp_path / names[1]).mkdir()
    with pytest.raises(UserError, match=f"cannot write .*{names[1]}: Is a directory"):
        save_folder(tmp_path, model(1), max_shard_bytes=40)
    assert (tmp_path / names[0]).exists()
    with pytest.raises(UserError, match="index.json is missing beside its shards"):
        load_folder(tmp_path)


def test_what_index_and_shards_disagree_on_is_named(tmp_path):
    *shards, index = save_folder(tmp_path, model(), max_shard_bytes=40)
    holder = json.loads((tmp_path / index).read_text())["weight_map"]["scalar"]
    intact = (tmp_path / holder).read_bytes()
    infos, _ = read_header(tmp_path / holder)
    kept = {n: t for n, t in model().items() if n in infos}
    save_tensors(tmp_path / holder, {**kept, "guest": mx.zeros(1)})
    with pytest.raises(UserError, match=f"{holder} is damaged: .* it also has 'guest'"):
        load_folder(tmp_path)
    del kept["scalar"]
    save_tensors(tmp_path / holder, kept)
    with pytest.raises(UserError, match=f"{holder} is damaged: .* it lacks 'scalar'"):
        load_folder(tmp_path)
    (tmp_path / holder).unlink()
    with pytest.raises(UserError, match=f"{holder} is missing; it is listed in the index"):
        load_folder(tmp_path)
    (tmp_path / holder).write_bytes(intact)
    with pytest.raises(UserError, match="no array 'd'"):
        load_folder(tmp_path, {"d": (None, None)}, allow_extra=True)
    with pytest.raises(UserError, match="make it first"):
        load_folder(tmp_path / "other", hint="make it first")


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "..", "", "a.bin", 3]
    + ["a\\b.safetensors", "a\0.safetensors"],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, name):
    save_tensors(tmp_path / "secret.safetensors", {"a": mx.zeros(1)})
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="index.json is damaged"):
        load_folder(folder)


def test_expected_tensors_are_checked_before_reading_data(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, model())
    assert set(load_tensors(path, {"c": (mx.float16, (4, None))}, allow_extra=True)) == set(model())
    with pytest.raises(UserError, match="'c' is float16, expected bfloat16"):
        load_tensors(path, {"c": (mx.bfloat16, None)}, allow_extra=True)
    with pytest.raises(UserError, match="unexpected array 'a.codes'"):
        load_tensors(path, {"c": (None, None)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not fit"),
        (b"\1\0\0", "does not fit"),
        ((2**63).to_bytes(8, "little") + bytes(50), "does not fit"),
        (raw_file(b"[]"), "not an object"),
        (raw_file(b" {}"), "not an object"),
        (raw_file(b"{" * 50_000), "header is not sound"),
        (raw_file({"a": 1}), "no dtype, shape and data_offsets"),
        (raw_file({"__metadata__": {"a": 1}}, 0), "table of strings"),
        (raw_file({"a": entry("F64")}), "dtype 'F64'; valid are BOOL"),
        (raw_file({"a": entry(shape=[-2])}), "shape"),
        (raw_file({"a": entry(shape=[2.0])}), "shape"),
        (raw_file({"a": entry(shape=[True, 2])}), "shape"),
        (raw_file({"a": entry(shape=[2**40, 2**40])}), "shape"),
        (raw_file({"a": entry(shape=[3])}), "needs 12 bytes, its data_offsets span 8"),
        (raw_file({"a": entry(offsets=[0])}), "data_offsets"),
        (raw_file({"a": entry(offsets=[8, 0])}), "span -8"),
        (raw_file({"a": entry(offsets=[8, 16])}), "starts at byte 8, expected 0"),
        (raw_file({"a": entry()}, 12), "end at byte 8 of 12"),
        (raw_file({"a": entry()}, 4), "end at byte 8 of 4"),
        (raw_file({"a": entry(), "b": entry()}), "starts at byte 0, expected 8"),
        (raw_file(b'{"a":{},"a":{}}'), "'a' is there twice"),
    ],
)
def test_bad_headers_are_named(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_tensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3"])
def test_a_sound_file_in_a_dtype_that_is_not_read_is_not_called_damaged(tmp_path, dtype):
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_file({"a": entry(dtype)}))
    with pytest.raises(UserError, match=f"has dtype '{dtype}'; valid .*; get the model in 16") as e:
        read_header(path)
    assert "damaged" not in str(e.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [({"a": np.zeros(1)}, "dtype float64; valid"), ({"__metadata__": mx.zeros(1)}, "no tensor")],
)
def test_what_the_format_cannot_hold_is_not_written(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message):
        save_tensors(tmp_path / "a.safetensors", tensors)
    assert list(tmp_path.iterdir()) == []
