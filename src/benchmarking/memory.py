"""What all rows need in memory together, from their shapes, before they are made."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import cli
from ..backends import Device
from ..inference.memory import is_block_linear, linears
from ..inference.sd3_memory import step_bytes
from ..models.configs import MMDiTConfig
from ..models.mmdit import MMDiT
from ..store import human_bytes
from .drawing import Job
from .rows import FLOAT, INT8, Spec

# Bytes that a kernel keeps of a weight beside its packed codes; in floats: as many as these have.
IN_FLOATS = ("dense", "simulated")
IN_BYTES = ("cuda_int8", "metal_int8")


def needed_bytes(
    specs: Sequence[Spec],
    config: MMDiTConfig,
    job: Job,
    text_tokens: int,
    dtype: mx.Dtype,
    packed: int,
) -> int:
    """Of all rows' transformers and of one step, but for what modulation keeps; `packed` are the
    bytes of the packed codes, which quantized rows share."""
    codes = sum(r * c for path, r, c in linears(config) if is_block_linear(path))
    others = sum(a.size for _, a in tree_flatten(MMDiT(config).parameters())) - codes
    total = packed if any(spec.kind not in (FLOAT, INT8) for spec in specs) else 0
    for spec in specs:
        if spec.kind == FLOAT:
            total += spec.dtype.size * (codes + others)
        elif spec.kind == INT8:
            total += codes + dtype.size * others
        elif spec.kernel in IN_FLOATS:
            total += dtype.size * codes
        elif spec.kernel in IN_BYTES:
            total += codes
    widest = max([dtype.size, *(spec.dtype.size for spec in specs if spec.dtype is not None)])
    return total + step_bytes(
        config,
        job.height,
        job.width,
        text_tokens=text_tokens,
        rows=job.rows,
        float_bytes=widest,
        fused_attention=Device.here().kind != "cpu",
    )


def require_memory(needed: int, rows: int) -> None:
    """Raises where the machine has less."""
    cli.require_memory(
        needed,
        f"{rows} rows need about {human_bytes(needed)} together",
        "compare fewer (--kernel, --dtype, --modulate none), or smaller pictures (--batch-size, "
        "--height, --width)",
    )
