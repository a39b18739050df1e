"""safetensors files and sharded folders, as MLX's and Hugging Face's tools read them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .arrays import Expected, check_expected, dtype_name, raw_bytes
from .atomic import atomic_write
from .files import check_relative_name, damaged, one_line, open_for_reading, os_error, shown
from .jsonfile import read_json, reject_duplicates, write_json

if TYPE_CHECKING:
    import mlx.core as mx

MAX_SHARD_BYTES = 5 * 10**9
MAX_HEADER_BYTES = 100 * 10**6
METADATA = {"format": "mlx"}
_MAX_LENGTH = 2**31 - 1  # MLX's shapes are 32-bit integers
_DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "C64": ("complex64", 8),
}
# Of the format too, but not of MLX.
_UNREAD = ("F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4")
_CODES = {name: (code, itemsize) for code, (name, itemsize) in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor; `nbytes` is its size in the file.

    `start` is the byte of the file at which a tensor that was read begins; it makes no difference
    to which tensor it is.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int = field(default=0, compare=False)


def read_header(path: str | Path, hint: str = "") -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, checked against the file's size."""
    with open_for_reading(path, hint) as (file, size):
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise damaged(path, f"a header of {length} bytes does not fit its {size} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=reject_duplicates)
        if not isinstance(header, dict) or raw[:1] != b"{":
            raise ValueError("it is not an object")
        metadata = _checked_metadata(header.pop("__metadata__", None))
        _refuse_unread(path, header)
        spans = {name: _parse_entry(name, entry) for name, entry in header.items()}
        _check_cover(spans, size - 8 - length)
    except UserError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        raise damaged(path, f"its header is not sound ({one_line(error)})") from error
    data = 8 + length
    placed = {name: replace(info, start=data + span[0]) for name, (info, span) in spans.items()}
    return placed, metadata


def load_tensors(
    path: str | Path, expect: Expected | None = None, allow_extra: bool = False, hint: str = ""
) -> dict[str, mx.array]:
    """The tensors of one file. MLX reads the data when it is first used."""
    import mlx.core as mx

    infos, _ = read_header(path, hint)
    found = {name: (info.dtype, info.shape) for name, info in infos.items()}
    check_expected(path, found, expect, allow_extra)
    try:
        tensors = mx.load(str(path), format="safetensors")
    except (RuntimeError, ValueError) as error:
        raise damaged(path, f"MLX cannot read it ({one_line(error)})") from error
    loaded = {name: (dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
    if loaded != found:
        raise damaged(path, "MLX reads other tensors than its header lists")
    return tensors


def save_tensors(
    path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] = METADATA
) -> None:
    """Write MLX or numpy arrays to one file, atomically; the same tensors give the same bytes."""
    header, places = lay_out(path, tensors, metadata)
    with atomic_write(path) as file:
        file.write(header)
        for name in places:
            file.write(raw_bytes(tensors[name]))


def lay_out(
    path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] = METADATA
) -> tuple[bytes, dict[str, int]]:
    """A file's first bytes, and the byte at which each tensor begins, in the order of the file.

    `tensors` are arrays or `TensorInfo`s: what counts is dtype, shape and nbytes.
    """
    # Wide types first keeps every tensor aligned to its own item size.
    entries = {name: _entry(path, name, tensor) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-entries[name][1], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position, places = 0, {}
    for name in order:
        entry, _, nbytes = entries[name]
        header[name] = {**entry, "data_offsets": [position, position + nbytes]}
        places[name] = position
        position += nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MAX_HEADER_BYTES:
        raise UserError(f"cannot write {path}: too many tensors for one file; use smaller shards")
    head = len(encoded).to_bytes(8, "little") + encoded
    return head, {name: len(head) + place for name, place in places.items()}


def save_folder(
    folder: str | Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] = METADATA,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    stem: str = "model",
) -> list[str]:
    """Write `model.safetensors`, or shards and their index, which comes last; return the names.

    Files of an older save under the same stem are removed.
    """
    folder = Path(folder)
    index = folder / f"{stem}.safetensors.index.json"
    shards = _split(folder, tensors, max_shard_bytes)
    count = len(shards)
    names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = [f"{stem}.safetensors"]
    # An old index would join old and new shards if this process were killed between two of them.
    _remove(index)
    for name, shard in zip(names, shards, strict=True):
        save_tensors(folder / name, {key: tensors[key] for key in shard}, metadata)
    if count > 1:
        weight_map = {key: n for n, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
        names.append(index.name)
    ours = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors")
    for path in sorted(folder.iterdir()):
        if ours.fullmatch(path.name) and path.name not in names:
            _remove(path)
    return names


def load_folder(
    folder: str | Path,
    expect: Expected | None = None,
    allow_extra: bool = False,
    stem: str = "model",
    hint: str = "",
) -> dict[str, mx.array]:
    """The tensors of a folder that holds one file, or shards and an index."""
    folder = Path(folder)
    index = _index_of(folder, stem)
    if index is None:
        return load_tensors(folder / f"{stem}.safetensors", expect, allow_extra, hint)
    tensors: dict[str, mx.array] = {}
    for name, listed in _read_index(index).items():
        shard = load_tensors(folder / name, hint=_LISTED)
        _check_listed(folder / name, set(shard), listed, index)
        tensors.update(shard)
    found = {name: (dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
    check_expected(folder, found, expect, allow_extra)
    return tensors


def read_folder_headers(
    folder: str | Path, stem: str = "model", hint: str = ""
) -> dict[Path, tuple[dict[str, TensorInfo], dict[str, str]]]:
    """Of each file of such a folder, its tensors and its metadata."""
    folder = Path(folder)
    index = _index_of(folder, stem)
    if index is None:
        single = folder / f"{stem}.safetensors"
        return {single: read_header(single, hint)}
    headers = {}
    for name, listed in _read_index(index).items():
        headers[folder / name] = read_header(folder / name, hint=_LISTED)
        _check_listed(folder / name, set(headers[folder / name][0]), listed, index)
    return headers


_LISTED = "it is listed in the index: copy it here too"


def _index_of(folder: Path, stem: str) -> Path | None:
    """The index of a folder of shards; None where there is a single file. That of a variant, such
    as model.fp16, has the variant's name near its end."""
    base, dot, variant = stem.rpartition(".")
    index = folder / f"{stem}.safetensors.index.json"
    of_variant = folder / f"{base}.safetensors.index.{variant}.json"
    for found in (index, *([of_variant] if dot else [])):
        if os.path.exists(found):
            return found
    single = folder / f"{stem}.safetensors"
    if not os.path.exists(single) and any(folder.glob(f"{stem}-*-of-*.safetensors")):
        raise UserError(
            f"{index} is missing beside its shards; copy it here too, or make the folder again"
        )
    return None


def _check_listed(path: Path, found: set[str], listed: set[str], index: Path) -> None:
    if found != listed:
        lacking, extra = sorted(listed - found), sorted(found - listed)
        what = f"lacks {shown(lacking[0])}" if lacking else f"also has {shown(extra[0])}"
        raise damaged(path, f"against its index {index.name} it {what}")


def _checked_metadata(metadata: Any) -> dict[str, str]:
    if metadata is None:  # MLX writes null where there is none
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is not a table of strings")
    return metadata


def _refuse_unread(path: str | Path, header: Mapping[str, Any]) -> None:
    """Raises for a dtype that is sound and not read."""
    for name, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if dtype in _UNREAD:
            raise UserError(
                f"{path}: tensor {shown(name)} has dtype {dtype!r}; valid are "
                f"{', '.join(_DTYPES)}; get the model in 16 bits, or save the tensor as F32"
            )


def _parse_entry(name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shown(name)} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        valid = ", ".join(_DTYPES)
        raise ValueError(f"tensor {shown(name)} has dtype {shown(dtype)}; valid are {valid}")
    if not _lengths(shape) or max(shape, default=0) > _MAX_LENGTH:
        raise ValueError(f"tensor {shown(name)} has shape {shown(shape)}")
    if not _lengths(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {shown(name)} has data_offsets {shown(offsets)}")
    dtype, itemsize = _DTYPES[dtype]
    nbytes = math.prod(shape) * itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(
            f"tensor {shown(name)}: {dtype} {shown(shape)} needs {nbytes} bytes, "
            f"its data_offsets span {offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape), nbytes), (offsets[0], offsets[1])


def _lengths(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_cover(spans: dict[str, tuple[TensorInfo, tuple[int, int]]], size: int) -> None:
    """The tensors must fill the data part, without holes and without sharing bytes."""
    position = 0
    for name, (_, (begin, end)) in sorted(spans.items(), key=lambda item: item[1][1]):
        if begin != position:
            raise ValueError(f"tensor {shown(name)} starts at byte {begin}, expected {position}")
        position = end
    if position != size:
        raise ValueError(f"its tensors end at byte {position} of {size}")


def _entry(path: str | Path, name: str, tensor: Any) -> tuple[dict[str, Any], int, int]:
    """The header entry (without offsets) of a tensor, its item size and its size in bytes."""
    dtype = dtype_name(tensor.dtype)
    if dtype not in _CODES or name == "__metadata__":
        raise UserError(
            f"cannot write {path}: tensor {shown(name)} of dtype {dtype}; "
            f"valid dtypes are {', '.join(_CODES)}, and no tensor may be named __metadata__"
        )
    code, itemsize = _CODES[dtype]
    return {"dtype": code, "shape": list(tensor.shape)}, itemsize, tensor.nbytes


def _split(folder: Path, tensors: Mapping[str, Any], max_shard_bytes: int) -> list[list[str]]:
    """Names in sorted order, cut into lists of at most `max_shard_bytes` (but one tensor each)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors):
        _, _, nbytes = _entry(folder, name, tensors[name])
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def _read_index(index: Path) -> dict[str, set[str]]:
    """Shard name: the tensors that the index says it holds."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(index, "it has no weight_map")
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        plain = check_relative_name(name, index)
        if "/" in plain or not plain.endswith(".safetensors"):
            raise damaged(index, f"{shown(plain)} is not the name of a safetensors file beside it")
        shards.setdefault(plain, set()).add(tensor)
    return dict(sorted(shards.items()))


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise os_error(error, path, "remove") from error
