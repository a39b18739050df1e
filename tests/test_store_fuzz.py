"""2,000 mutated files: a clear error or sound data, in bounded memory, and never code that runs.

The mutations run in a process of its own whose address space is limited:
`python -m tests.test_store_fuzz FOLDER` prints what happened as JSON.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import resource
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.store import (
    hash_arrays,
    load_folder,
    load_npz,
    load_tensors,
    read_json,
    read_manifest,
    save_npz,
    save_tensors,
    write_json,
)

import mlx.core as mx
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
COUNTS = {"npz": 700, "json": 600, "safetensors": 700}
MEMORY_BYTES = 512 * 2**20
MAX_NPZ_BYTES = 64 * 2**20
ARRAYS = {
    "x": np.linspace(-1, 1, 60, dtype=np.float16).reshape(3, 4, 5),
    "blocks.0.attn.q_proj__weight_int": np.arange(-8, 8, dtype=np.int8).reshape(4, 4),
    "sigma": np.array(0.5, np.float32),
    "mask": np.array([True, False, True]),
}
EXPECT = {name: (array.dtype, array.shape) for name, array in ARRAYS.items()}
RECORD = {"files": {"samples/a.npz": {"bytes": 3}}, "info": None}
DATA = {"format": "fuzz", "version": 3, "units": {"unit0": RECORD}, "made_from": {"model": "nano"}}
HOSTILE_NAMES = ["../x", "..", "../../etc/passwd", "/etc/passwd", "a/../../x", "..\\x", "a//b", ""]
HUGE = [2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


class Pickled:
    """Makes the file `marker` when somebody unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


class Mutator:
    """Makes one hostile file after the other from sound ones; `flips` says if the last was only
    flipped, in which case a format without a checksum may give other values back."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.marker = folder / "code-was-run"
        save_npz(folder / "sound.npz", **ARRAYS)
        np.savez_compressed(folder / "packed.npz", **ARRAYS)
        save_tensors(folder / "sound.safetensors", {n: mx.array(a) for n, a in ARRAYS.items()})
        write_json(folder / "sound.json", DATA)
        self.npz_files = [(folder / name).read_bytes() for name in ("sound.npz", "packed.npz")]
        self.tensor_file = (folder / "sound.safetensors").read_bytes()
        self.json_file = (folder / "sound.json").read_bytes()
        self.zeros = bomb(10**8)

    def truncated(self, content: bytes) -> bytes:
        return content[: self.rng.randrange(len(content) - 1)]

    def flipped(self, content: bytes) -> bytes:
        changed = bytearray(content)
        for _ in range(self.rng.choice([1, 1, 1, 2, 8])):
            changed[self.rng.randrange(len(changed))] ^= 1 << self.rng.randrange(8)
        return bytes(changed)

    # ---- npz

    def npz(self) -> tuple[str, bytes]:
        kinds: list[tuple[str, Callable[[bytes], bytes]]] = [
            ("truncated", self.truncated),
            ("flipped", self.flipped),
            ("wrong header", lambda _: self.npz_wrong_header()),
            ("other arrays", lambda _: self.npz_other_arrays()),
            ("huge in the zip", self.npz_huge),
            ("pickle", lambda _: self.npz_pickle()),
            ("hostile name", lambda _: self.npz_name()),
            ("bomb", lambda _: self.zeros),
        ]
        kind, make = self.rng.choices(kinds, weights=[4, 6, 5, 2, 3, 3, 2, 0.2])[0]
        return kind, make(self.rng.choice(self.npz_files))

    def npz_wrong_header(self) -> bytes:
        huge = self.rng.choice(HUGE)
        descr, shape = self.rng.choice(
            [
                ("<f2", (3, 4, 6)),
                ("<f2", (huge,)),
                ("<f2", (huge, 0)),
                ("<f2", (huge, huge, huge)),
                ("<f2", (-3, -4, 5)),
                ("<f2", (3, 4, 5.0)),
                ("<f2", [3, 4, 5]),
                ("<f2", "345"),
                ("<f8", (3, 4, 5)),
                ("|O", (15,)),
                ("|V120", (1,)),
                (f"|V{huge}", (1,)),
                (f"<U{huge}", ()),
                ([("a", "<f2", (huge,))], (1,)),
                ([("a", "|O")], (15,)),
                ("__import__('os')", (1,)),
                (None, (1,)),
            ]
        )
        member = npy(descr, shape, ARRAYS["x"].tobytes())
        if self.rng.random() < 0.3:
            member = bytearray(member)
            place = self.rng.choice([6, 7, 8, 9])
            member[place] = self.rng.choice([0, 0xFE, 0xFF])
        compression = self.rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
        return zip_of({"x.npy": bytes(member)}, compression)

    def npz_other_arrays(self) -> bytes:
        arrays = dict(ARRAYS)
        name = self.rng.choice(list(arrays))
        change = self.rng.randrange(4)
        if change == 0:
            arrays[name] = arrays[name].astype(np.float64)
        elif change == 1:
            arrays[name] = np.stack([arrays[name]] * 2)
        elif change == 2:
            del arrays[name]
        else:
            arrays["guest"] = np.zeros(self.rng.randrange(1, 1000))
        content = io.BytesIO()
        np.savez(content, **arrays)
        return content.getvalue()

    def npz_huge(self, content: bytes) -> bytes:
        """A huge packed or unpacked size, in the directory, the member's own header or both."""
        changed = bytearray(content)
        size = struct.pack("<I", self.rng.choice([2**31, 2**32 - 16, 10**9]))
        fields = [(b"PK\1\2", 20), (b"PK\1\2", 24), (b"PK\5\6", 12), (b"PK\5\6", 16)]
        for signature, offset in self.rng.sample(fields, self.rng.randint(1, 3)):
            place = changed.index(signature) + offset
            changed[place : place + 4] = size
        return bytes(changed)

    def npz_pickle(self) -> bytes:
        hostile = Pickled(self.marker)
        objects = np.array([hostile], dtype=object)
        content = io.BytesIO()
        protocol = self.rng.randrange(6)
        kind = self.rng.randrange(5)
        if kind == 0:
            np.savez(content, x=objects)
        elif kind == 1:
            np.save(content, objects)
        elif kind == 2:
            return pickle.dumps(hostile, protocol)
        elif kind == 3:
            return zip_of({self.rng.choice(["x", "x.pkl"]): pickle.dumps(hostile, protocol)})
        else:
            return zip_of({"x.npy": pickle.dumps(hostile, protocol)})
        return content.getvalue()

    def npz_name(self) -> bytes:
        name = self.rng.choice(HOSTILE_NAMES + ["x", "x.npy/", ".npy", "a\nb", "é"])
        return zip_of({"x.npy": npy(), name + self.rng.choice(["", ".npy"]): npy()})

    # ---- JSON

    def json(self) -> tuple[str, bytes]:
        kinds: list[tuple[str, Callable[[], bytes]]] = [
            ("truncated", lambda: self.truncated(self.json_file)),
            ("flipped", lambda: self.flipped(self.json_file)),
            ("broken", self.json_broken),
            ("wrong value", self.json_wrong_value),
            ("hostile name", self.json_name),
            ("pickle", lambda: pickle.dumps(Pickled(self.marker), self.rng.randrange(6))),
        ]
        kind, make = self.rng.choices(kinds, weights=[4, 6, 4, 4, 3, 1])[0]
        return kind, make()

    def json_broken(self) -> bytes:
        body = self.json_file.rstrip()[:-1].decode()
        return self.rng.choice(
            [
                f'{body}, "format": "fuzz"}}',
                f'{body}, "x": NaN}}',
                f'{body}, "x": -Infinity}}',
                f'{body}, "x": 1e{self.rng.randrange(309, 99999)}}}',
                f'{body}, "x": {"9" * self.rng.randrange(4301, 20000)}}}',
                f'{body}, "x": {"[" * self.rng.randrange(10_000, 200_000)}',
                f'{body}, "x": {"[" * 100_000}{"]" * 100_000}}}',
                "[" + body + "}]",
                '"' + "x" * 1000 + '"',
                "null",
                body + '}{"a": 1}',
            ]
        ).encode(self.rng.choice(["utf-8", "utf-8", "utf-16"]))

    def json_wrong_value(self) -> bytes:
        key = self.rng.choice(["format", "version", "units"])
        values: list[Any] = [None, True, -1, 2.5, "x" * 100_000, [], {}, {"unit0": 3}, [[]] * 99]
        if key == "units":  # an empty table of units would be right
            values = [value for value in values if value != {}]
        return json.dumps({**DATA, key: self.rng.choice(values)}).encode()

    def json_name(self) -> bytes:
        files = {self.rng.choice(HOSTILE_NAMES + ["a\nb", "a\0b"]): {"bytes": 3}}
        record = {**RECORD, "files": files}
        return json.dumps({**DATA, "units": {"unit0": record}}).encode()

    # ---- safetensors

    def safetensors(self) -> tuple[str, bytes]:
        kinds: list[tuple[str, Callable[[], bytes]]] = [
            ("truncated", lambda: self.truncated(self.tensor_file)),
            ("flipped", lambda: self.flipped(self.tensor_file)),
            ("huge header", self.tensors_huge_header),
            ("wrong entry", self.tensors_wrong_entry),
            ("other tensors", self.tensors_other),
            ("pickle", lambda: pickle.dumps(Pickled(self.marker), self.rng.randrange(6))),
        ]
        kind, make = self.rng.choices(kinds, weights=[4, 6, 2, 6, 2, 1])[0]
        return kind, make()

    def tensors_huge_header(self) -> bytes:
        size = self.rng.choice(HUGE + [len(self.tensor_file), 10**8, 10**9])
        return struct.pack("<Q", size) + self.tensor_file[8:]

    def tensors_wrong_entry(self) -> bytes:
        length = int.from_bytes(self.tensor_file[:8], "little")
        header = json.loads(self.tensor_file[8 : 8 + length])
        name = self.rng.choice(list(ARRAYS))
        huge = self.rng.choice(HUGE)
        begin, end = header[name]["data_offsets"]
        key, value = self.rng.choice(
            [
                ("shape", [huge]),
                ("shape", [huge, 0]),
                ("shape", [huge, huge]),
                ("shape", [-1, end - begin]),
                ("shape", [end - begin, 7]),
                ("shape", None),
                ("shape", [[1]]),
                ("dtype", "F64"),
                ("dtype", "U64"),
                ("dtype", "O"),
                ("dtype", ["F16"]),
                ("data_offsets", [begin, huge]),
                ("data_offsets", [huge, huge + end - begin]),
                ("data_offsets", [begin + 1, end + 1]),
                ("data_offsets", [-1, end - begin - 1]),
                ("data_offsets", [end, begin]),
                ("data_offsets", []),
                ("guest", 1),
            ]
        )
        header[name][key] = value
        encoded = json.dumps(header).encode()
        return struct.pack("<Q", len(encoded)) + encoded + self.tensor_file[8 + length :]

    def tensors_other(self) -> bytes:
        names = list(ARRAYS)
        self.rng.shuffle(names)
        header: dict[str, Any] = {}
        position = 0
        for name in names[: self.rng.randint(0, 3)] + ["../../guest"]:
            header[name] = {"dtype": "U8", "shape": [4], "data_offsets": [position, position + 4]}
            position += 4
        encoded = json.dumps(header).encode()
        return struct.pack("<Q", len(encoded)) + encoded + bytes(position)


def npy(descr: Any = "<f4", shape: Any = (2,), data: bytes = bytes(8)) -> bytes:
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


def zip_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


def bomb(size: int) -> bytes:
    """An npz of `size` zeros, packed piece by piece so that the peak of memory stays honest."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("x.npy", "w") as member:
            member.write(npy("|u1", (size,), b""))
            for start in range(0, size, 2**20):
                member.write(bytes(min(2**20, size - start)))
    return content.getvalue()


def read_npz(path: Path) -> None:
    arrays = load_npz(path, EXPECT, max_bytes=MAX_NPZ_BYTES)
    assert hash_arrays(arrays) == hash_arrays(ARRAYS), "the checksums let other values through"


def read_tensors(path: Path) -> None:
    tensors = load_tensors(path, EXPECT)
    mx.eval(tensors)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        name: array.shape for name, array in ARRAYS.items()
    }


def read_record(path: Path) -> None:
    data = read_json(path, "fuzz", 3)
    assert data["format"] == "fuzz" and data["version"] == 3
    assert read_manifest(path.parent, "fuzz", 3) == data


def outcome(read: Callable[[Path], None], path: Path) -> str:
    """ "refused" with a clear error, "read" as sound data, or what else happened."""
    try:
        read(path)
        return "read"
    except UserError as error:
        text = str(error)
        clear = str(path.parent) in text and "; " in text and text.isprintable()
        return "refused" if clear and len(text) < 900 else f"unclear error: {text[:900]}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def fuzz(folder: Path) -> dict[str, Any]:
    mutator = Mutator(folder, seed=2000)
    (folder / "samples").mkdir()
    (folder / "samples" / "a.npz").write_bytes(b"abc")
    files = {"npz": "a.npz", "json": "manifest.json", "safetensors": "a.safetensors"}
    readers = {"npz": read_npz, "json": read_record, "safetensors": read_tensors}
    for format, name in files.items():  # the sound files first: the reader is not merely refusing
        (folder / f"sound.{format}").rename(folder / name)
        readers[format](folder / name)
    limit_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tally: Counter[str] = Counter()
    wrong: list[str] = []
    for format, name in files.items():
        for number in range(COUNTS[format]):
            kind, content = getattr(mutator, format)()
            (folder / name).write_bytes(content)
            result = outcome(readers[format], folder / name)
            tally[f"{format} {kind} {result[:7]}"] += 1
            if result not in ("refused", "read") or (result == "read" and kind != "flipped"):
                wrong.append(f"{format} {kind} {number}: {result}")
            if mutator.marker.exists():
                wrong.append(f"{format} {kind} {number}: code was run")
                mutator.marker.unlink()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    unit = 1 if sys.platform == "darwin" else 1024
    return {"tally": tally, "wrong": wrong, "grown_bytes": grown * unit}


def limit_memory() -> None:
    """No more than MEMORY_BYTES on top of what the process has, where the system can do that."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))


@pytest.mark.slow
def test_2000_mutated_files_give_clear_errors_in_bounded_memory_and_run_no_code(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "tests.test_store_fuzz", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["wrong"] == []
    assert sum(result["tally"].values()) == 2000
    assert result["grown_bytes"] < MEMORY_BYTES // 2
    assert process.stderr == ""


def test_the_pickles_of_the_fuzz_would_run_code(tmp_path):
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Pickled(marker))).close()
    assert marker.exists()


@pytest.mark.parametrize("name", [name for name in HOSTILE_NAMES if name])
def test_an_index_with_a_hostile_name_reads_no_other_file(tmp_path, name):
    index = {"weight_map": {"a": name, "b": name + ".safetensors"}}
    write_json(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(UserError, match="model.safetensors.index.json is damaged"):
        load_folder(tmp_path)


if __name__ == "__main__":
    print(json.dumps(fuzz(Path(sys.argv[1]))))
