"""JSON and npz files: round trips, the same bytes again, and clear errors."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from pathlib import Path

from src.errors import UserError
from src.store import (
    hash_arrays,
    hash_json,
    load_npz,
    read_json,
    require_match,
    save_npz,
    write_json,
)

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

names = st.from_regex(r"[A-Za-z0-9_]{1,6}(\.[a-z0-9_]{1,5}){0,2}", fullmatch=True)
dtypes = st.sampled_from(["bool", "int8", "uint16", "int32", "<i8", ">i4", "f2", "f4", ">f8"])
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
arrays = dtypes.flatmap(lambda dtype: hnp.arrays(np.dtype(dtype), shapes))
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


# ---- JSON


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_json_round_trip_and_bytes_free_of_key_order(data):
    with tempfile.TemporaryDirectory() as folder:
        write_json(f"{folder}/a.json", data)
        write_json(f"{folder}/b.json", dict(reversed(data.items())))
        assert read_json(f"{folder}/a.json") == data
        assert Path(folder, "a.json").read_bytes() == Path(folder, "b.json").read_bytes()
    assert hash_json(data) == hash_json(dict(reversed(data.items())))


def test_json_is_for_people_too(tmp_path):
    write_json(tmp_path / "a.json", {"b": (1, np.float32(0.5)), "version": 1, "format": "f"})
    expected = '{\n  "format": "f",\n  "version": 1,\n  "b": [\n    1,\n    0.5\n  ]\n}\n'
    assert (tmp_path / "a.json").read_text() == expected


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), np.float16("inf")])
def test_json_refuses_what_other_readers_cannot_read(tmp_path, bad):
    with pytest.raises(UserError, match=r"a.json: rows\[1\].loss is (nan|-?inf)"):
        write_json(tmp_path / "a.json", {"rows": [{}, {"loss": bad}]})
    assert not (tmp_path / "a.json").exists()
    with pytest.raises(TypeError, match="keys"):
        write_json(tmp_path / "a.json", {"steps": {1: 2}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'{"a": NaN}', "not a finite number"),
        (b'{"a": 1e999}', "not a finite number"),
        (b'{"a": "\xff"}', "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "holds a list, not an object"),
    ],
)
def test_bad_json_is_named(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=message) as error:
        read_json(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_json_header_errors_name_both_sides_and_the_way_out(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match="is missing; run the first stage"):
        read_json(path, "ditq-a", 1, hint="run the first stage")
    write_json(path, {"format": "ditq-b", "version": 2})
    assert read_json(path, "ditq-b", 2) == {"format": "ditq-b", "version": 2}
    with pytest.raises(UserError, match="has format 'ditq-b', this program reads 'ditq-a'"):
        read_json(path, "ditq-a", 2)
    with pytest.raises(UserError, match="has version 2 .* reads version 1; run the first stage"):
        read_json(path, "ditq-b", 1, hint="run the first stage")
    write_json(path, {"format": "ditq-b", "version": True})
    with pytest.raises(UserError, match="version True"):
        read_json(path, "ditq-b", 1)
    with pytest.raises(UserError, match="more than the 10"):
        read_json(path, max_bytes=10)
    with pytest.raises(UserError, match="not a regular file"):
        read_json(tmp_path)


def test_a_mismatch_names_the_first_key_and_both_values():
    found = {"model": {"hash": "abc", "name": "nano"}, "steps": [1, 2]}
    require_match("x.json", found, {"model": {"name": "nano", "hash": "abc"}, "steps": (1, 2)}, "")
    with pytest.raises(
        UserError, match="x.json has model.hash = 'abc', this run has model.hash = 'd'; go"
    ):
        require_match("x.json", found, {"model": {"name": "nano", "hash": "d"}}, "go")
    with pytest.raises(UserError, match="has steps = absent, this run has steps = 3"):
        require_match("x.json", {}, {"steps": 3}, "go")


def test_json_of_a_foreign_writer_with_lone_surrogates_round_trips(tmp_path):
    (tmp_path / "a.json").write_text('{"name": "\\ud800"}')
    data = read_json(tmp_path / "a.json")
    write_json(tmp_path / "b.json", data)
    assert json.loads((tmp_path / "b.json").read_bytes()) == data


# ---- npz


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(names, arrays, max_size=4))
def test_npz_round_trip_and_bytes_free_of_order(data):
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "a.npz"), Path(folder, "b.npz")
        save_npz(first, **data)
        save_npz(second, **{k: np.asarray(v, order="F") for k, v in reversed(data.items())})
        assert first.read_bytes() == second.read_bytes()
        loaded = load_npz(first, {k: (v.dtype.newbyteorder("="), v.shape) for k, v in data.items()})
        with np.load(first) as same:
            for name, array in data.items():
                np.testing.assert_array_equal(loaded[name], array, strict=False)
                np.testing.assert_array_equal(loaded[name], same[name])
                assert loaded[name].flags.writeable and loaded[name].shape == array.shape
        np.savez_compressed(second, **data)
        again = load_npz(second)
    assert hash_arrays(loaded) == hash_arrays(again) == hash_arrays(data)


def test_npz_takes_linear_paths_and_any_keyword(tmp_path):
    key = "multimodal_transformer_blocks.0.image_transformer_block.attn.q_proj__weight_int"
    codes = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    save_npz(tmp_path / "a.npz", **{key: codes, "path": np.float32(1), "file": mx.arange(3)})
    loaded = load_npz(tmp_path / "a.npz", {key: ("int8", (None, 4))}, allow_extra=True)
    np.testing.assert_array_equal(loaded[key], codes)
    assert loaded["path"].shape == () and loaded["file"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["", "../a", "/a", "a/b", "a..b", "a\\b", ".a", "a\n", "é"])
def test_npz_names_that_could_be_paths_are_not_written(tmp_path, name):
    with pytest.raises(UserError, match="array name"):
        save_npz(tmp_path / "a.npz", **{name: np.zeros(1)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "value", [np.array([None]), np.zeros(1, "f4,i4"), np.array(["a"]), np.zeros(1, complex)]
)
def test_npz_dtypes_that_are_not_plain_numbers_are_not_written(tmp_path, value):
    with pytest.raises(UserError, match="convert it"):
        save_npz(tmp_path / "a.npz", x=value)


def test_npz_expectations_name_the_array_and_both_sides(tmp_path):
    path = tmp_path / "a.npz"
    save_npz(path, x=np.zeros((2, 3), np.float16), sigma=np.float32(0.5))
    both = {"x": (np.float16, (None, 3)), "sigma": (None, ())}
    assert set(load_npz(path, both)) == {"x", "sigma"}
    for expect, message in [
        ({**both, "timestep": (None, None)}, "no array 'timestep' .it holds 'sigma', 'x'."),
        ({**both, "x": ("float32", None)}, "'x' is float16, expected float32"),
        ({**both, "x": (None, (None, 4))}, r"'x' has shape \(2, 3\), expected \(any, 4\)"),
        ({"x": both["x"]}, "unexpected array 'sigma'"),
    ]:
        with pytest.raises(UserError, match=message):
            load_npz(path, expect)
    with pytest.raises(UserError, match="is missing; run it"):
        load_npz(tmp_path / "b.npz", hint="run it")


def test_npz_finite_names_the_array_and_the_place(tmp_path):
    bad = np.zeros((2, 2), np.float16)
    bad[1, 0] = np.nan
    save_npz(tmp_path / "a.npz", fine=np.zeros(3), bad=bad)
    assert set(load_npz(tmp_path / "a.npz")) == {"bad", "fine"}
    with pytest.raises(UserError, match=r"'bad' is nan at \(1, 0\)"):
        load_npz(tmp_path / "a.npz", finite=True)


def test_npz_limit_is_checked_before_unpacking(tmp_path):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros(10_000_000, np.uint8))
    assert path.stat().st_size < 20_000
    with pytest.raises(UserError, match="more than the limit of 1000000"):
        load_npz(path, max_bytes=1_000_000)


def npz_of(member: bytes, name: str = "x.npy") -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, member)
    return content.getvalue()


def npy(descr: object = "<f4", shape: object = (2,), data: bytes = bytes(8)) -> bytes:
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a sound npz"),
        (b"PK", "not a sound npz"),
        (npz_of(npy(shape=(3,))), "needs 12 bytes of data, the member has 8"),
        (npz_of(npy(shape=(2**62, 2**62))), "needs"),
        (npz_of(npy(shape=(-1,))), "shape"),
        (npz_of(npy(shape=(1,) * 100)), "shape"),
        (npz_of(npy(shape=(True, 2))), "shape"),
        (npz_of(npy(descr="|O")), "never Python objects"),
        (npz_of(npy(descr=[("a", "<f4")])), "never Python objects"),
        (npz_of(npy(descr="|b1", data=b"\0\2")), "bool values other"),
        (npz_of(b"\x80\x04."), "ends too early"),
        (npz_of(npy(), "../x.npy"), "name '../x.npy' is not allowed"),
        (npz_of(npy(), "x.pkl"), "name 'x.pkl' is not allowed"),
    ],
)
def test_bad_npz_is_named(tmp_path, content, message):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_npz(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
