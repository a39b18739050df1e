"""Atomic files, hashes, locks and disk space."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from src.errors import UserError
from src.store import (
    atomic_write,
    folder_lock,
    free_bytes,
    hash_arrays,
    hash_file,
    human_bytes,
    remove_stale_temporaries,
    require_space,
    require_writable,
    short_hash,
    write_bytes,
)

import mlx.core as mx
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# ---- atomic files


def test_an_exception_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "made" / "on the way" / "file.bin"
    write_bytes(path, b"old")
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write(b"new")
        raise KeyError("stop")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


def test_the_new_file_has_the_permissions_of_an_ordinary_one(tmp_path):
    write_bytes(tmp_path / "ours", b"")
    (tmp_path / "ordinary").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_readers_and_cleaners_never_disturb_a_writer(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"0" * 1000)
    stop = threading.Event()

    def clean() -> None:
        while not stop.is_set():
            remove_stale_temporaries(tmp_path)

    cleaner = threading.Thread(target=clean)
    cleaner.start()
    try:
        for i in range(30):
            write_bytes(path, str(i % 10).encode() * 1000)
            assert path.read_bytes() == str(i % 10).encode() * 1000
    finally:
        stop.set()
        cleaner.join()


def test_only_temporaries_of_dead_writers_are_removed(tmp_path):
    stale = tmp_path / "samples" / ".0001.npz.tmp-99999-0123abcd"
    stale.parent.mkdir()
    stale.write_bytes(b"half")
    others = [tmp_path / ".notes.tmp", tmp_path / "a.tmp-1-0123abcd", tmp_path / ".a.tmp-1-xyz"]
    for path in others:
        path.write_bytes(b"mine")
    with atomic_write(tmp_path / "live") as file:
        file.write(b"content")
        assert remove_stale_temporaries(tmp_path) == [stale]
    assert (tmp_path / "live").read_bytes() == b"content"
    assert all(path.exists() for path in others) and not stale.exists()


@pytest.mark.parametrize("name", ["a-file/below", "a-folder", "n" * 300])
def test_a_place_where_nothing_can_be_written_is_one_clear_line(tmp_path, name):
    (tmp_path / "a-file").write_bytes(b"old")
    (tmp_path / "a-folder").mkdir()
    with pytest.raises(UserError, match="cannot write .*; ") as error:
        write_bytes(tmp_path / name, b"x")
    assert name in str(error.value) and "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-file", "a-folder"]


def test_an_error_on_another_file_inside_the_block_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "out") as file:
        file.write((tmp_path / "no such input").read_bytes())
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
import numpy as np
from src.errors import UserError
from src.store import save_npz, save_tensors, write_bytes, write_json
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
big = np.zeros(1_000_000, np.float32)
for write in (
    lambda folder: write_bytes(f"{folder}/a.bin", bytes(4_000_000)),
    lambda folder: save_npz(f"{folder}/a.npz", x=big),
    lambda folder: write_json(f"{folder}/a.json", {"text": "x" * 4_000_000}),
    lambda folder: save_tensors(f"{folder}/a.safetensors", {"x": big}),
):
    try:
        write(sys.argv[1])
        print("written")
    except UserError as error:
        print(error)
"""


def test_a_write_that_the_system_cuts_off_keeps_the_old_files(tmp_path):
    files = ["a.bin", "a.npz", "a.json", "a.safetensors"]
    for name in files:
        (tmp_path / name).write_bytes(b"old")
    output, _ = start(FULL_DISK, tmp_path).communicate()
    lines = output.splitlines()
    assert len(lines) == 4
    for name, line in zip(files, lines, strict=True):
        assert line.startswith(f"cannot write {tmp_path / name}: File too large")
        assert (tmp_path / name).read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)


# ---- hashes


def test_hashes_cover_name_dtype_shape_and_bytes_of_either_library():
    base = hash_arrays({"a": np.arange(6, dtype=np.float32), "b": np.int8(1)})
    assert base == hash_arrays({"b": mx.array(1, mx.int8), "a": mx.arange(6, dtype=mx.float32)})
    others = [
        {"a": np.arange(6, dtype=np.float32), "c": np.int8(1)},
        {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.int8(1)},
        {"a": np.arange(6, dtype=np.float32).view(np.int32), "b": np.int8(1)},
        {"a": np.arange(6, dtype=np.float32)[::-1], "b": np.int8(1)},
        {"a": np.arange(6, dtype=np.float32)},
    ]
    assert len({base, *map(hash_arrays, others)}) == 6
    half = mx.arange(6).astype(mx.bfloat16)
    assert hash_arrays({"a": half}) != hash_arrays({"a": half.view(mx.uint16)})
    assert hash_arrays({"a": half.reshape(2, 3).T}) == hash_arrays(
        {"a": mx.contiguous(half.reshape(2, 3).T)}
    )


def test_hash_of_a_file_is_its_sha256(tmp_path):
    write_bytes(tmp_path / "a", b"abc")
    digest = hash_file(tmp_path / "a")
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert short_hash(digest) == "ba7816bf8f01cfea"
    with pytest.raises(UserError, match="missing"):
        hash_file(tmp_path / "b")


# ---- lock


HOLD = """
import sys
from src.store import folder_lock
with folder_lock(sys.argv[1], rank=int(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_told_who_holds_the_folder_until_that_one_is_killed(tmp_path):
    folder = tmp_path / "out"
    holder = start(HOLD, folder, 0)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"{folder} is in use by process {holder.pid}"):
        with folder_lock(folder):
            pass
    with folder_lock(folder, rank=1):
        pass
    holder.kill()
    holder.communicate()
    with folder_lock(folder), pytest.raises(UserError, match="in use"):
        with folder_lock(folder, rank=0):
            pass
    with folder_lock(folder):
        pass


def test_ranks_of_one_run_share_a_folder_and_two_runs_do_not(tmp_path):
    holder = start(HOLD, tmp_path, 1)
    assert holder.stdout.readline() == "held\n"
    with folder_lock(tmp_path, rank=0), folder_lock(tmp_path, rank=2):
        with pytest.raises(UserError, match=f"process {holder.pid}"):
            with folder_lock(tmp_path, rank=1):
                pass
    holder.communicate("")
    assert holder.returncode == 0


# ---- disk


def test_space_is_refused_with_both_numbers_before_the_folder_exists(tmp_path):
    folder = tmp_path / "not" / "yet"
    require_space(folder, 1, "the cache")
    need = free_bytes(folder) * 10
    with pytest.raises(UserError, match=f"the cache needs {human_bytes(need)}, the disk of .*/yet"):
        require_space(folder, need, "the cache")
    assert not folder.parent.exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    require_writable(tmp_path / "not" / "yet")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write to .*file/below"):
        require_writable(tmp_path / "file" / "below")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (5 * 10**9, "5.0 GB"),
        (2.5e15, "2.5 PB"),
    ],
)
def test_bytes_in_the_units_of_a_disk(count, text):
    assert human_bytes(count) == text
