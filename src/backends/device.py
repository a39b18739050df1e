"""What decides how fast a backend is: the kind of machine, and the generation of its GPU."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

HOPPER = 90  # of NVIDIA: H100 and H200
M5 = 17  # the first of Apple's GPU generations that multiplies small integers fast


@dataclass(frozen=True)
class Device:
    """`kind` is cpu, metal or cuda; `generation` that of an Apple GPU (M4: 16) or the compute
    capability of an NVIDIA one without its point (H200: 90), on a CPU 0."""

    kind: str
    generation: int = 0

    @classmethod
    def here(cls) -> Device:
        """The device that MLX computes on by default."""
        if mx.default_device() == mx.Device(mx.cpu):
            return cls("cpu")
        if not mx.metal.is_available():
            return cls("cuda", capability(mx.device_info()))
        return cls("metal", apple_generation(str(mx.device_info().get("architecture", ""))))


def apple_generation(architecture: str) -> int:
    """Of an Apple GPU by its name, 0 of another name."""
    found = re.match(r"applegpu_g(\d+)(p?)", architecture)
    # A phone's GPU counts one more than that of a Mac with the same units: A18 Pro, g17p, is no M5.
    return int(found[1]) - len(found[2]) if found else 0


def capability(info: Mapping[str, Any]) -> int:
    """10·major + minor of what MLX says about a CUDA device."""
    major, minor = (int(info.get(f"compute_capability_{part}", 0)) for part in ("major", "minor"))
    return 10 * major + minor


def device_name() -> str:
    """What MLX calls the device that it computes on; without a name the machine's kind."""
    info = mx.device_info()
    return str(info.get("device_name") or info.get("architecture") or platform.machine())
