"""Facts about an array, from MLX or numpy alike: dtype name, shape, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .files import shown

Expected = Mapping[str, "tuple[Any, tuple[int | None, ...] | None]"]
"""Per array name: its dtype (None: any) and its shape (None: any; None inside: any length)."""


def dtype_name(dtype: Any) -> str:
    """The short name, such as "float32" or "bfloat16", of an MLX or numpy dtype or of a name."""
    if isinstance(dtype, str) or type(dtype).__module__.startswith("mlx"):
        return str(dtype).removeprefix("mlx.core.").removesuffix("_")
    return np.dtype(dtype).name


def raw_bytes(array: Any) -> np.ndarray:
    """The bytes of an MLX or numpy array in row order, little-endian, as a flat uint8 array."""
    if type(array).__module__.startswith("mlx"):
        if dtype_name(array.dtype) == "bfloat16":
            import mlx.core as mx

            array = array.view(mx.uint16)
        array = np.array(array, copy=False)
    if array.dtype.hasobject:
        raise TypeError("arrays of Python objects have no bytes to store")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def check_expected(
    path: str | Path,
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    expect: Expected | None,
    allow_extra: bool,
) -> None:
    """Raise unless `found` (name: dtype name, shape) in file `path` is what is expected there."""
    if expect is None:
        return
    for name, (dtype, shape) in expect.items():
        if name not in found:
            held = ", ".join(shown(n) for n in sorted(found)[:8]) or "nothing"
            raise UserError(f"{path} has no array {shown(name)} (it holds {held}); {_WAY_OUT}")
        found_dtype, found_shape = found[name]
        if dtype is not None and found_dtype != dtype_name(dtype):
            raise UserError(
                f"{path}: array {shown(name)} is {found_dtype}, "
                f"expected {dtype_name(dtype)}; {_WAY_OUT}"
            )
        if shape is not None and not _matches(found_shape, shape):
            wanted = str(tuple("any" if n is None else n for n in shape)).replace("'", "")
            raise UserError(
                f"{path}: array {shown(name)} has shape {found_shape}, "
                f"expected {wanted}; {_WAY_OUT}"
            )
    extra = sorted(set(found) - set(expect))
    if extra and not allow_extra:
        raise UserError(f"{path} holds an unexpected array {shown(extra[0])}; {_WAY_OUT}")


_WAY_OUT = "use a file of this model and stage, or make it again"


def _matches(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(found) == len(wanted) and all(
        w in (None, f) for f, w in zip(found, wanted, strict=True)
    )
