"""Checkpoints of which one piece is in memory at a time: safetensors, npz and PyTorch's files."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import UserError
from ..models.checkpoints import stem_of
from ..store import (
    NpzReader,
    TensorInfo,
    open_npz,
    read_folder_headers,
    read_header,
    read_pieces,
)

INDEX = ".safetensors.index.json"
TORCH = (".pt", ".pth", ".bin", ".ckpt")
KNOWN = f".safetensors, a folder of shards or its {INDEX}, .npz, {', '.join(TORCH)}"
REMAP_BYTES = 16 * 10**6  # read of a map, after which it is let go

Tensors = dict[str, TensorInfo]


class Source(Protocol):
    """An open checkpoint. Names are those below the key, if one was given."""

    path: Path
    files: tuple[Path, ...]
    tensors: Tensors
    metadata: dict[str, str]

    def pieces(self, name: str, piece_bytes: int) -> Iterator[np.ndarray]:
        """The tensor's bytes in row order, in uint8 arrays of `piece_bytes`, the last shorter."""
        ...


@contextmanager
def open_source(path: str | Path, key: str | None = None) -> Iterator[Source]:
    """The checkpoint at `path`; of it what is below `key`."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give {KNOWN}")
    if path.is_dir() or path.name.endswith((INDEX, ".safetensors")):
        yield SafetensorsSource(path, key)
    elif path.suffix == ".npz":
        with open_npz(path) as reader:
            yield NpzSource(path, reader, key)
    elif path.suffix in TORCH:
        yield TorchSource(path, key)
    else:
        raise UserError(f"{path} is no checkpoint that is read here; give {KNOWN}")


class SafetensorsSource:
    def __init__(self, path: Path, key: str | None) -> None:
        headers, index = _headers(path)
        self.path = path
        self.files = (*headers, *index)
        self.metadata: dict[str, str] = {}
        found: dict[str, tuple[Path, TensorInfo]] = {}
        for file, (tensors, metadata) in headers.items():
            self.metadata.update(metadata)
            # Data is read in the order in which it lies on the disk.
            for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
                found[name] = (file, info)
        self._places = below(found, key, path)
        self.tensors = {name: info for name, (_, info) in self._places.items()}

    def pieces(self, name: str, piece_bytes: int) -> Iterator[np.ndarray]:
        file, info = self._places[name]
        return read_pieces(file, info, piece_bytes)


class NpzSource:
    def __init__(self, path: Path, reader: NpzReader, key: str | None) -> None:
        self.path, self.files, self.metadata = path, (path,), {}
        self._reader = reader
        self._names = below({name: name for name in reader.arrays}, key, path)
        self.tensors = {name: tensor_info(*reader.arrays[own]) for name, own in self._names.items()}

    def pieces(self, name: str, piece_bytes: int) -> Iterator[np.ndarray]:
        return cut(np.ascontiguousarray(self._reader.read(self._names[name])), piece_bytes)


class TorchSource:
    """Memory-mapped by PyTorch, which reads no code from the file (`weights_only`).

    What was read of a map stays in memory, so the file is mapped anew now and then.
    """

    def __init__(self, path: Path, key: str | None) -> None:
        self.path, self.files, self.metadata = path, (path,), {"format": "pt"}
        self._key, self._read = key, 0
        data, self._mapped = load_torch(path)
        self._data = nested(data, key, path)
        self.tensors = {
            name: tensor_info(str(t.dtype).removeprefix("torch."), tuple(t.shape))
            for name, t in self._data.items()
        }

    def pieces(self, name: str, piece_bytes: int) -> Iterator[np.ndarray]:
        import torch

        if self._mapped and self._read > REMAP_BYTES:
            self._data, self._read = {}, 0
            self._data = nested(load_torch(self.path)[0], self._key, self.path)
        self._read += self.tensors[name].nbytes
        tensor = self._data[name].detach().contiguous().reshape(-1)
        return cut(tensor.view(torch.uint8).numpy(), piece_bytes)


def below(found: Mapping[str, Any], key: str | None, path: Path) -> dict[str, Any]:
    """What stands under names that begin with `key` and a dot, without these; all without a key."""
    if not key:
        return dict(found)
    chosen = {n[len(key) + 1 :]: found[n] for n in found if n.startswith(f"{key}.")}
    if not chosen:
        tops = sorted({name.split(".")[0] for name in found})
        raise UserError(f"{path} has no key {key!r}; it has: {', '.join(tops[:8]) or 'none'}")
    return chosen


def nested(data: Mapping[str, Any], key: str | None, path: Path) -> dict[str, Any]:
    """The tensors of a PyTorch file: at its top, in the table at `key`, or whose names begin so."""
    table = table_at(data, key) if key else data
    if table is None:
        table = below(data, key, path)
    tensors = {
        str(n): plain(t, str(n), path) for n, t in table.items() if hasattr(t, "untyped_storage")
    }
    if not tensors:
        tables = [str(name) for name, value in table.items() if isinstance(value, Mapping)]
        raise UserError(
            f"{path} has no tensors {f'under {key}' if key else 'at its top'}; name the table "
            f"that holds them with --checkpoint_key (it has: {', '.join(tables[:8]) or 'none'})"
        )
    return tensors


def plain(tensor: Any, name: str, path: Path) -> Any:
    """The tensor, if its numbers are all there and lie as they are."""
    layout = str(tensor.layout).removeprefix("torch.")
    if tensor.is_meta:
        kind = "of device meta, without numbers"
    elif tensor.is_quantized:
        kind = "quantized by PyTorch"
    elif tensor.is_nested or layout != "strided":
        kind = "nested" if tensor.is_nested else f"of layout {layout}"
    elif tensor.is_conj() or tensor.is_neg():
        kind = "a lazy conjugate or negative"
    else:
        return tensor
    raise UserError(
        f"{path}: tensor {name} is {kind}; valid: dense tensors that hold their own numbers; "
        "save it as one, or leave it out"
    )


def table_at(data: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """The table under a name, or under several joined with dots."""
    for part in [key] if key in data else key.split("."):
        data = data.get(part)
        if not isinstance(data, Mapping):
            return None
    return data


def load_torch(path: Path) -> tuple[dict[str, Any], bool]:
    """What the file holds, and whether it is mapped and not loaded."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is PyTorch's: install torch, or convert the file to safetensors"
        ) from error
    try:
        mapped = zipfile.is_zipfile(path)  # files of before 2020 are none
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{path} is no file of tensors that PyTorch reads safely ({why}); "
            "save its state_dict again"
        ) from error
    if not isinstance(data, Mapping):
        raise UserError(f"{path} holds a {type(data).__name__}, not a table of tensors")
    return {str(name): value for name, value in data.items()}, mapped


def cut(array: np.ndarray, piece_bytes: int) -> Iterator[np.ndarray]:
    raw = array.reshape(-1).view(np.uint8)
    for begin in range(0, raw.size, piece_bytes):
        yield raw[begin : begin + piece_bytes]


def tensor_info(dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    """Of a tensor that is read by name; dtypes that safetensors has not are refused on writing."""
    itemsize = 2 if dtype == "bfloat16" else np.dtype(_numpy_name(dtype)).itemsize
    return TensorInfo(dtype, shape, int(np.prod(shape, dtype=np.int64)) * itemsize)


def _numpy_name(dtype: str) -> str:
    try:
        return np.dtype(dtype).name
    except TypeError:
        return "uint8"  # of PyTorch's 8-bit floats


def _headers(path: Path) -> tuple[dict[Path, tuple[Tensors, dict[str, str]]], tuple[Path, ...]]:
    """Header of each file, and the index if there is one."""
    if path.is_file() and not path.name.endswith(INDEX):
        return {path: read_header(path)}, ()
    if path.is_dir():
        inner = path / "transformer"  # where diffusers keeps it in a whole pipeline's folder
        folder = inner if inner.is_dir() else path
        stem = stem_of(folder)
    else:
        folder, stem = path.parent, path.name.removesuffix(INDEX)
    index = folder / f"{stem}{INDEX}"
    return read_folder_headers(folder, stem), (index,) if index.exists() else ()
