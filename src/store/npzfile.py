"""npz files: the same arrays give the same bytes; sizes are checked before memory is asked for."""

from __future__ import annotations

import ast
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import UserError
from .arrays import Expected, check_expected
from .atomic import atomic_write
from .files import damaged, one_line, open_for_reading, shown

MAX_NPZ_BYTES = 4 * 2**30
_MEMBER = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_.\-]*\.npy")
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_BFLOAT = re.compile(r"[<|]?V2")  # how MLX and NumPy write bfloat16, which npy has no name for
_MAX_HEADER_BYTES = 65536
_MAX_DIMENSIONS = 32
_CHUNK_BYTES = 2**20
# Deflate cannot pack tighter than 1032 to 1; a member that claims to is lying about its size.
_MAX_DEFLATE_RATIO = 1032


def save_npz(path: str | Path, /, **arrays: Any) -> None:
    """Write arrays (bool, integer, float) uncompressed and atomically, names in sorted order.

    Names are letters, digits, `_`, `-` and single dots: save_npz(path, **{"a.b": array}).
    """
    checked = {name: _storable(path, name, arrays[name]) for name in sorted(arrays)}
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in checked.items():
            # ZipInfo's fixed date and our fixed attributes keep the bytes free of the clock.
            info = zipfile.ZipInfo(f"{name}.npy")
            info.create_system = 3
            info.external_attr = 0o600 << 16
            info.file_size = array.nbytes + _MAX_HEADER_BYTES
            with archive.open(info, "w") as member:
                np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)


def load_npz(
    path: str | Path,
    expect: Expected | None = None,
    max_bytes: int = MAX_NPZ_BYTES,
    finite: bool = False,
    allow_extra: bool = False,
    hint: str = "",
    only: Collection[str] | None = None,
) -> dict[str, np.ndarray]:
    """Read all arrays, in the machine's byte order; at most `max_bytes` bytes together.

    `expect` names the arrays that must be there, with dtype and shape, and no others may be
    unless `allow_extra`. `finite` refuses NaN and infinity. `hint` says how to make the file.
    `only` names the arrays to read of a large file; the others are passed over unread.
    """
    with open_for_reading(path, hint) as (file, size):
        try:
            with zipfile.ZipFile(file) as archive:
                members = _checked_members(archive, size, max_bytes)
                if only is not None:
                    members = {n: m for n, m in members.items() if n in only}
                arrays = {n: _read_member(archive, m) for n, m in members.items()}
        except _UNSOUND as error:
            raise damaged(path, f"not a sound npz file ({one_line(error)})") from error
    found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    check_expected(path, found, expect, allow_extra)
    if finite:
        _check_finite(path, arrays)
    return arrays


class NpzReader:
    """An open npz file of which arrays are read one at a time, whatever it holds in all.

    Two bytes without a meaning are bfloat16; NumPy has it not, so they are read as void.
    """

    def __init__(self, path: str | Path, archive: zipfile.ZipFile, size: int) -> None:
        self._path, self._archive = path, archive
        with self._sound():
            self._members = _checked_members(archive, size, max_bytes=None)
            self.arrays = {name: self._look(info) for name, info in self._members.items()}

    def read(self, name: str) -> np.ndarray:
        with self._sound():
            return _read_member(self._archive, self._members[name], bfloat=True)

    def _look(self, info: zipfile.ZipInfo) -> tuple[str, tuple[int, ...]]:
        with self._archive.open(info) as member:
            dtype, _, shape, _ = _read_array_header(member, info.filename, bfloat=True)
        return "bfloat16" if dtype.kind == "V" else dtype.name, shape

    @contextmanager
    def _sound(self) -> Iterator[None]:
        try:
            yield
        except _UNSOUND as error:
            raise damaged(self._path, f"not a sound npz file ({one_line(error)})") from error


@contextmanager
def open_npz(path: str | Path, hint: str = "") -> Iterator[NpzReader]:
    """A reader whose `arrays` tell dtype name and shape of each; `read(name)` reads one."""
    with open_for_reading(path, hint) as (file, size):
        try:
            archive = zipfile.ZipFile(file)
        except _UNSOUND as error:
            raise damaged(path, f"not a sound npz file ({one_line(error)})") from error
        with archive:
            yield NpzReader(path, archive, size)


_UNSOUND = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,  # also NotImplementedError: zip features that npz does not use
    LookupError,
    MemoryError,
    OSError,  # seeking to a place before the start of the file
)


def _storable(path: str | Path, name: str, value: Any) -> np.ndarray:
    array = np.asarray(value, order="C")
    if not _MEMBER.fullmatch(f"{name}.npy"):
        raise UserError(
            f"cannot write {path}: array name {shown(name)} may only have letters, digits, "
            "'_', '-' and single dots"
        )
    if not _DTYPE.fullmatch(array.dtype.str):
        raise UserError(
            f"cannot write {path}: array {shown(name)} is {array.dtype}; "
            "convert it to bool, an integer or float16/32/64"
        )
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _checked_members(
    archive: zipfile.ZipFile, file_size: int, max_bytes: int | None
) -> dict[str, zipfile.ZipInfo]:
    """Array name: member, after every claim that can be checked without reading data."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if not _MEMBER.fullmatch(info.filename):
            raise ValueError(f"member name {shown(info.filename)} is not allowed")
        name = info.filename.removesuffix(".npy")
        if name in members:
            raise ValueError(f"array {shown(name)} is there twice")
        if info.flag_bits & 1:
            raise ValueError(f"array {shown(name)} is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"array {shown(name)} has an unknown compression")
        ratio = 1 if info.compress_type == zipfile.ZIP_STORED else _MAX_DEFLATE_RATIO
        if info.compress_size > file_size or info.file_size > info.compress_size * ratio:
            raise ValueError(f"array {shown(name)} claims more bytes than the file can hold")
        members[name] = info
    total = sum(info.file_size for info in members.values())
    if max_bytes is not None and total > max_bytes:
        raise ValueError(f"its arrays take {total} bytes, more than the limit of {max_bytes}")
    return members


def _read_member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, bfloat: bool = False
) -> np.ndarray:
    with archive.open(info) as member:
        header = _read_array_header(member, info.filename, bfloat)
        dtype, fortran_order, shape, header_bytes = header
        nbytes = math.prod(shape) * dtype.itemsize
        if header_bytes + nbytes != info.file_size:
            raise ValueError(
                f"{info.filename}: {dtype} {shape} needs {nbytes} bytes of data, "
                f"the member has {info.file_size - header_bytes}"
            )
        buffer = np.empty(nbytes, np.uint8)
        for start in range(0, nbytes, _CHUNK_BYTES):
            _fill(member, memoryview(buffer)[start : start + _CHUNK_BYTES], info.filename)
        # Reading past the end is what makes zipfile compare the checksum.
        if member.read(1):
            raise ValueError(f"{info.filename} is longer than it claims")
    if dtype.kind == "b" and nbytes and buffer.max() > 1:
        raise ValueError(f"{info.filename} has bool values other than 0 and 1")
    array = buffer.view(dtype).reshape(shape, order="F" if fortran_order else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


def _read_array_header(
    member: IO[bytes], name: str, bfloat: bool = False
) -> tuple[np.dtype, bool, tuple[int, ...], int]:
    """The dtype, order and shape of an npy member, and the length of its header in bytes."""
    magic = _exactly(member, 8, name)
    if magic[:6] != b"\x93NUMPY" or magic[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError(f"{name} is not an npy array")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(_exactly(member, width, name), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"{name} has a header of {length} bytes")
    text = _exactly(member, length, name).decode("latin-1")
    dtype, fortran_order, shape = _parse_array_header(text, name, bfloat)
    return dtype, fortran_order, shape, 8 + width + length


def _parse_array_header(
    text: str, name: str, bfloat: bool
) -> tuple[np.dtype, bool, tuple[int, ...]]:
    try:
        # No escape belongs into a header, and Python would warn about the wrong ones.
        header = {} if "\\" in text else ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        header = {}
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise ValueError(f"{name} has no sound npy header")
    descr, fortran_order, shape = header["descr"], header["fortran_order"], header["shape"]
    known = isinstance(descr, str) and (
        _DTYPE.fullmatch(descr) or (bfloat and _BFLOAT.fullmatch(descr))
    )
    if not known:
        raise ValueError(
            f"{name} has dtype {shown(descr)}; only bool, integers and floats are read, "
            "never Python objects"
        )
    if not isinstance(fortran_order, bool) or not isinstance(shape, tuple):
        raise ValueError(f"{name} has no sound npy header")
    if len(shape) > _MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{name} has shape {shown(shape)}")
    return np.dtype(descr), fortran_order, shape


def _exactly(member: IO[bytes], count: int, name: str) -> bytes:
    buffer = bytearray(count)
    _fill(member, memoryview(buffer), name)
    return bytes(buffer)


def _fill(member: IO[bytes], view: memoryview, name: str) -> None:
    done = 0
    while done < len(view):
        piece = member.read(len(view) - done)
        if not piece:
            raise EOFError(f"{name} ends too early")
        view[done : done + len(piece)] = piece
        done += len(piece)


def _check_finite(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise UserError(
                f"{path}: array {shown(name)} is {array[place]} at {place}; only finite numbers "
                "can be used: make the file again"
            )
