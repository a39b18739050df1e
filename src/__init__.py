"""Post-training quantization of diffusion transformers on MLX."""

from __future__ import annotations

import sys

from . import blas, cuda
from .version import VERSION as __version__  # noqa: F401

blas.preload()  # before anything imports mlx.core
cuda.keep_few_under_way()

try:
    import mlx.core  # noqa: F401
except ImportError as error:
    # Not a bug to trace but a package to install, so commands and imports end with one line.
    backend = (
        "" if sys.platform == "darwin" else " 'ditq[cpu]' or 'ditq[cuda]' (mlx[cpu], mlx[cuda13])"
    )
    sys.exit(f"error: MLX cannot start here ({error}); install{backend or ' mlx'} with pip")


def __getattr__(name: str) -> object:
    """`inject` and `eject`, for a DiffusionKit pipeline, are imported when first asked for."""
    if name not in ("inject", "eject"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .inference import bridge

    return getattr(bridge, name)
