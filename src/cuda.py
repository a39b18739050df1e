"""How MLX starts its kernels on an NVIDIA GPU: what it reads from the environment before its first
computation, and never again. What the user has set stays."""

from __future__ import annotations

import os
import sys

GRAPHS = "MLX_USE_CUDA_GRAPHS"
KERNELS_AT_ONCE = "MLX_MAX_OPS_PER_BUFFER"
FEW = 20  # MLX starts a hundred at once on a Hopper GPU, and ten times as many may be under way


def launch_singly() -> None:
    """No CUDA graphs in this process: an iteration of learned rounding then takes 12 ms, not 19.
    Without them as many kernels as MLX likes: what an iteration holds is estimated with those."""
    os.environ.setdefault(GRAPHS, "0")
    if os.environ.get(KERNELS_AT_ONCE) == str(FEW):
        del os.environ[KERNELS_AT_ONCE]


def keep_few_under_way() -> None:
    """MLX runs ahead of the GPU, and holds what the kernels that are under way read and write: at
    SD3's size that was most of a step's memory, for no time. A Mac has bounds of its own."""
    if sys.platform != "darwin":
        os.environ.setdefault(KERNELS_AT_ONCE, str(FEW))
