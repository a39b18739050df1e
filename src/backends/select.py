"""Which backend multiplies: the fastest that is known for a machine and a shape, or one by name."""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx

from ..errors import UserError
from .cuda_int8 import CudaInt8
from .dense import Dense
from .device import M5, Device
from .quantized_matmul import QuantizedMatmul
from .reference import Reference
from .unpack import Unpack
from .weight import Weight


class Backend(Protocol):
    name: str

    def prepare(self, weight: Weight, dtype: mx.Dtype, largest: int | None) -> dict[str, Any]:
        """What `multiply` needs, made once; `dtype` is what products may be taken in, `largest`
        the largest absolute code that x will hold (None: x will hold floats)."""

    def multiply(self, x: mx.array, factor: mx.array | None, operand: dict[str, Any]) -> mx.array:
        """(…, rows) float32; with a factor x holds codes of that unit, without one floats."""


# An integer kernel joins here, and in `select` for the devices and shapes on which it is faster.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Reference(),
        Dense(),
        Unpack(),
        QuantizedMatmul(),
        CudaInt8(),
        CudaInt8(keeps_packed=True),
    )
}

FEW_ROWS = 32  # below it, reading the weights takes longer than multiplying


def named(name: str) -> Backend:
    """The backend of that name."""
    if name not in BACKENDS:
        raise UserError(f"unknown kernel {name!r}; valid: {', '.join(BACKENDS)}")
    return BACKENDS[name]


def select(device: Device, rows: int, N: int, K: int) -> Backend:
    """The backend for (rows, K) inputs of an (N, K) weight on that device."""
    if device.kind == "cpu":
        return named("dense")
    if rows < FEW_ROWS or (device.kind == "metal" and device.generation >= M5):
        return named("quantized_matmul")
    return named("dense")
