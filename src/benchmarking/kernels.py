"""Which kernels there are to compare, and which of them this device cannot run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..backends import BACKENDS, Backend, Weight, cuda_int8, idle, metal_int8, named
from ..backends.cuda_int8 import CudaInt8
from ..backends.metal_int8 import MetalInt8
from ..models.mmdit import MMDiT
from ..quant.linear import QuantizedLinear
from .subjects import quantized_layers

REFUSALS = {CudaInt8: cuda_int8.refusal, MetalInt8: metal_int8.refusal}  # of single weights


@dataclass(frozen=True)
class Available:
    """Names of kernels that run, and of those that do not with the reason."""

    names: list[str]
    left_out: dict[str, str]


def available(asked: Sequence[str]) -> Available:
    """Of those asked for, or of all; an unknown name is an error. A kernel that would leave all
    layers to another one does not run."""
    names = list(dict.fromkeys(asked)) or list(BACKENDS)
    reasons = {name: reason for name in names if (reason := idle(named(name)))}
    return Available([name for name in names if name not in reasons], reasons)


def replaced_note(transformer: MMDiT, backend: Backend) -> str | None:
    """What to say of layers that the kernel leaves to another one."""
    if not isinstance(backend, tuple(REFUSALS)):
        return None
    layers, refused = quantized_layers(transformer), REFUSALS[type(backend)]
    reasons = [r for layer in layers.values() if (r := refusal(layer, refused))]
    if not reasons:
        return None
    return (
        f"{backend.name} leaves {len(reasons)} of {len(layers)} layers to another kernel: "
        f"{reasons[0]}"
    )


def refusal(layer: QuantizedLinear, refused: Callable[[Weight, int | None], str]) -> str:
    """Why an integer kernel does not take the layer, empty if it does."""
    quantizes = "a_scale" in layer and not layer.runtime.weights_only
    weight = Weight(layer.weight, layer.scales, layer.bits)
    return refused(weight, layer.largest_code() if quantizes else None)
