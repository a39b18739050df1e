"""What decides how fast a backend is: the kind of machine, and the generation of an Apple chip."""

from __future__ import annotations

import re
from dataclasses import dataclass

import mlx.core as mx

M5 = 17  # the first of Apple's GPU generations that multiplies small integers fast


@dataclass(frozen=True)
class Device:
    """`kind` is cpu, metal or cuda; `generation` that of an Apple GPU (M4: 16), else 0."""

    kind: str
    generation: int = 0

    @classmethod
    def here(cls) -> Device:
        """The device that MLX computes on by default."""
        if mx.default_device() == mx.Device(mx.cpu):
            return cls("cpu")
        if not mx.metal.is_available():
            return cls("cuda")
        found = re.match(r"applegpu_g(\d+)", str(mx.device_info().get("architecture", "")))
        return cls("metal", int(found[1]) if found else 0)
