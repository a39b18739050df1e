"""How codes are multiplied: one file a backend, and the choice between them.

All give factor·Σ_g scale[n, g]·Σ_k code[n, k]·x[…, k] in float32, the inner sum over the columns of
a group. Where x holds the codes of activations, the inner sums are whole numbers; `reference`, and
`dense` and `unpack` in float32, give them exactly. A row with a NaN in it gives NaN in all its
outputs.
"""

from .device import Device, device_name
from .select import (
    BACKENDS,
    UNPACKING,
    Backend,
    choose,
    idle,
    integer_kernel,
    named,
    select,
    select_ready,
    staying_packed,
)
from .weight import MLX_BITS, Weight

__all__ = [
    "BACKENDS",
    "MLX_BITS",
    "UNPACKING",
    "Backend",
    "Device",
    "Weight",
    "choose",
    "device_name",
    "idle",
    "integer_kernel",
    "named",
    "select",
    "staying_packed",
    "select_ready",
]
