"""Which kernels there are to compare, and which of them this device cannot run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..backends import BACKENDS, Backend, Weight, cuda_int8, idle, named
from ..models.mmdit import MMDiT
from ..quant.linear import QuantizedLinear
from .subjects import quantized_layers


@dataclass(frozen=True)
class Available:
    """Names of kernels that run, and of those that do not with the reason."""

    names: list[str]
    left_out: dict[str, str]


def available(asked: Sequence[str]) -> Available:
    """Of those asked for, or of all; an unknown name is an error."""
    names = list(dict.fromkeys(asked)) or list(BACKENDS)
    reasons = {name: reason for name in names if (reason := reason_against(named(name)))}
    return Available([name for name in names if name not in reasons], reasons)


def reason_against(backend: Backend) -> str:
    """Why this device has no such kernel, empty if it has one: another would multiply instead."""
    return idle(backend)


def replaced_note(transformer: MMDiT, backend: Backend) -> str | None:
    """What to say of layers that the kernel leaves to another one."""
    if not isinstance(backend, cuda_int8.CudaInt8):
        return None
    layers = quantized_layers(transformer)
    reasons = [r for layer in layers.values() if (r := refusal(layer))]
    if not reasons:
        return None
    return (
        f"{backend.name} leaves {len(reasons)} of {len(layers)} layers to another kernel: "
        f"{reasons[0]}"
    )


def refusal(layer: QuantizedLinear) -> str:
    """Why integer kernels do not take the layer, empty if they do."""
    quantizes = "a_scale" in layer and not layer.runtime.weights_only
    weight = Weight(layer.weight, layer.scales, layer.bits)
    return cuda_int8.refusal(weight, layer.largest_code() if quantizes else None)
