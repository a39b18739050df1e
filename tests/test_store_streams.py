"""safetensors written and read piece by piece, and npz arrays read one at a time."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from src.errors import UserError
from src.store import (
    TensorInfo,
    open_npz,
    read_folder_headers,
    read_header,
    read_pieces,
    remove_stale_temporaries_of,
    save_folder,
    save_npz,
    save_tensors,
    stream_tensors,
)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

arrays = st.sampled_from(["i1", "u1", "f2", "f4", "i8"]).flatmap(
    lambda dtype: hnp.arrays(np.dtype(dtype), hnp.array_shapes(min_dims=1, max_side=6))
)
names = st.text("abc.", min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(names, arrays, max_size=5), st.integers(1, 50), st.randoms())
def test_pieces_in_any_order_give_the_file_that_is_written_at_once(data, size, rng):
    with tempfile.TemporaryDirectory() as folder:
        whole, streamed = Path(folder, "a.safetensors"), Path(folder, "b.safetensors")
        save_tensors(whole, data)
        infos, metadata = read_header(whole)
        order = list(data)
        rng.shuffle(order)
        with stream_tensors(streamed, infos, metadata) as writer:
            for name in order:
                for piece in read_pieces(whole, infos[name], size):
                    assert piece.nbytes <= size
                    writer.write(name, piece)
        assert streamed.read_bytes() == whole.read_bytes()
        raw = whole.read_bytes()
        for name, info in infos.items():
            assert raw[info.start : info.start + info.nbytes] == data[name].tobytes()


@pytest.mark.parametrize(("size", "message"), [(7, "lacks 1 bytes"), (9, "1 bytes too many")])
def test_a_tensor_of_another_size_than_announced_leaves_no_file(tmp_path, size, message):
    infos = {"a": TensorInfo("uint8", (8,), 8)}
    with pytest.raises(ValueError, match=message):
        with stream_tensors(tmp_path / "a.safetensors", infos) as writer:
            writer.write("a", np.zeros(size, np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": np.zeros(100, np.float32)})
    info = read_header(path)[0]["a"]
    os.truncate(path, info.start + 10)
    with pytest.raises(UserError, match="became shorter"):
        list(read_pieces(path, info, 64))


def test_headers_of_a_folder_are_those_of_its_files(tmp_path):
    data = {name: np.full(10, i, np.float32) for i, name in enumerate("abc")}
    for limit, count in ((50, 3), (1000, 1)):
        save_folder(tmp_path, data, max_shard_bytes=limit)
        headers = read_folder_headers(tmp_path)
        assert len(headers) == count
        assert {n for tensors, _ in headers.values() for n in tensors} == set(data)
        for path, header in headers.items():
            assert header == read_header(path)


def test_only_the_leftovers_of_one_file_are_removed(tmp_path):
    ours = tmp_path / ".a.safetensors.tmp-123-0123abcd"
    others = [
        tmp_path / ".b.safetensors.tmp-123-0123abcd",
        tmp_path / ".a.safetensors.tmp-mine",
        tmp_path / "below" / ".a.safetensors.tmp-123-0123abcd",
    ]
    others[-1].parent.mkdir()
    for path in (ours, *others):
        path.write_bytes(b"x")
    assert remove_stale_temporaries_of(tmp_path / "a.safetensors") == [ours]
    assert all(path.exists() for path in others) and not ours.exists()
    assert remove_stale_temporaries_of(tmp_path / "absent" / "a.safetensors") == []


def test_npz_arrays_one_at_a_time(tmp_path):
    path = tmp_path / "a.npz"
    data = {"a.b": np.arange(6).reshape(2, 3), "c": np.ones(100_000, np.float16)}
    save_npz(path, **data)
    with open_npz(path) as reader:
        assert reader.arrays == {"a.b": ("int64", (2, 3)), "c": ("float16", (100_000,))}
        for name in reversed(data):
            np.testing.assert_array_equal(reader.read(name), data[name])
    raw = bytearray(path.read_bytes())
    raw[raw.index(data["c"].tobytes()) + 150_000] ^= 1
    path.write_bytes(raw)
    with open_npz(path) as reader:
        np.testing.assert_array_equal(reader.read("a.b"), data["a.b"])
        with pytest.raises(UserError, match="a.npz is damaged"):
            reader.read("c")
