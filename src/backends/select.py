"""Which backend multiplies: the fastest that is known for a machine and a shape, or one by name."""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx

from ..errors import UserError
from . import cuda_int8, metal_int8
from .cuda_int8 import CudaInt8
from .dense import Dense
from .device import Device
from .metal_int8 import MetalInt8
from .quantized_matmul import QuantizedMatmul
from .reference import Reference
from .tuning import chosen, table_for
from .unpack import Unpack
from .weight import Weight


class Backend(Protocol):
    name: str

    def prepare(self, weight: Weight, dtype: mx.Dtype, largest: int | None) -> dict[str, Any]:
        """What `multiply` needs, made once; `dtype` is what products may be taken in, `largest`
        the largest absolute code that x will hold (None: x will hold floats)."""

    def multiply(self, x: mx.array, factor: mx.array | None, operand: dict[str, Any]) -> mx.array:
        """(…, rows) float32; with a factor x holds codes of that unit, without one floats."""


PACKED_TILES = CudaInt8(keeps_packed=True)
# An integer kernel joins here, and in tuning.py as one that may be chosen.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Reference(),
        Dense(),
        Unpack(),
        QuantizedMatmul(),
        CudaInt8(),
        PACKED_TILES,
        MetalInt8(),
    )
}

UNPACKING = ("dense", "cuda_int8", "metal_int8")  # these keep more than the packed codes


def staying_packed() -> str:
    """The name of the fastest backend here that keeps nothing but the packed codes."""
    if Device.here().kind == "cpu":
        return Unpack.name
    return PACKED_TILES.name if cuda_int8.usable() else QuantizedMatmul.name


def named(name: str) -> Backend:
    """The backend of that name."""
    if name not in BACKENDS:
        raise UserError(f"unknown kernel {name!r}; valid: {', '.join(BACKENDS)}")
    return BACKENDS[name]


def select(device: Device, rows: int, N: int, K: int, *, integers: bool = True) -> Backend:
    """The backend for (rows, K) inputs of an (N, K) weight on that device.

    Without `integers`, inputs are floats or scales are those of groups, which integer kernels do
    not take.
    """
    name = chosen(table_for(device, integers), rows, N, K)
    if name == "metal_int8" and not metal_int8.takes(N, K):
        name = chosen(table_for(device, integers=False), rows, N, K)
    return named(name)


def select_ready(device: Device, rows: int, N: int, K: int, *, integers: bool = True) -> Backend:
    """The same among those that do not leave all products to others."""
    backend = select(device, rows, N, K, integers=integers)
    return select(device, rows, N, K, integers=False) if idle(backend) else backend


def integer_kernel(N: int, K: int) -> str | None:
    """The name of the one that multiplies such a weight on this machine, whether it is the fastest
    or not."""
    if cuda_int8.usable():
        return "cuda_int8"
    return "metal_int8" if metal_int8.takes(N, K) else None


def choose(weight: Weight, rows: int, largest: int | None) -> Backend:
    """The one that multiplies this weight here with so many rows of codes up to `largest`, or of
    floats (None)."""
    device, shape = Device.here(), (len(weight.scales), weight.columns)
    integers = not cuda_int8.refusal(weight, largest)
    return select_ready(device, rows, *shape, integers=integers)


def idle(backend: Backend) -> str:
    """Why it leaves all products to others on this machine, empty if it multiplies by itself: an
    integer kernel passes its self-test first."""
    for kind, kernels in ((CudaInt8, cuda_int8), (MetalInt8, metal_int8)):
        if isinstance(backend, kind) and not kernels.usable():
            return kernels.status().removeprefix("not used: ")
    return ""
