"""A fast BLAS for MLX on Linux CPUs.

MLX's CPU wheel carries the reference BLAS. A library that is loaded with global symbols before
`mlx.core` is found first by the linker, so its products run instead: some 40 to 90 times faster.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

LIBRARY = "libopenblas.so.0"
SWITCH = "DITQ_BLAS"  # "off", or the path of another library


def preload() -> None:
    """Loads OpenBLAS where there is one; without it everything works, only slower."""
    choice = os.environ.get(SWITCH, "")
    if not sys.platform.startswith("linux") or choice == "off":
        return
    for candidate in [choice] if choice else candidates():
        try:
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
            return
        except OSError:
            continue


def candidates() -> Iterator[str]:
    """Where OpenBLAS may be: the environment's own (conda), then the system's."""
    yield str(Path(sys.prefix) / "lib" / LIBRARY)
    yield LIBRARY


def loaded() -> str | None:
    """Path of the OpenBLAS in this process, if any."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    # NumPy's own copy, libscipy_openblas…, has other symbol names and does not count.
    for line in maps.read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith("libopenblas"):
            return path
    return None


def describe() -> str:
    """Which BLAS multiplies matrices on the CPU, and what to do if it is the slow one."""
    if sys.platform == "darwin":
        return "Accelerate"
    if path := loaded():
        return f"OpenBLAS ({path})"
    if os.environ.get(SWITCH) == "off":
        return f"MLX's bundled reference BLAS ({SWITCH}=off)"
    return "MLX's bundled reference BLAS, slow; faster: apt-get install libopenblas0-pthread"
