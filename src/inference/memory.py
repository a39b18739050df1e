"""What a quantized transformer takes on disk and in memory, from its shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import mlx.nn as nn
from mlx.utils import tree_flatten

from ..backends.weight import group_size
from ..models.configs import MMDiTConfig
from ..models.mmdit import MMDiT
from ..models.paths import EMBEDDERS, MODULATION

SIXTEEN, FLOAT = 2, 4  # bytes of a number


@dataclass(frozen=True)
class Layout:
    """How a transformer is quantized."""

    bits: int = 4  # of the block linears' weights, one scale per output channel
    modulation_bits: int = 8  # 16: not quantized
    modulation_group: int = 128
    steps: int = 28  # of the activation table; 0: activations stay in floats
    shifted: bool = True  # fc2's inputs


@dataclass(frozen=True)
class Bytes:
    """A transformer's bytes, by what they are for."""

    codes: int  # of the block linears
    scales: int
    modulation: int
    embedders: int  # and all other layers that stay in 16 bits
    vectors: int  # biases, activation tables, shifts

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def disk_bytes(config: MMDiTConfig, layout: Layout) -> Bytes:
    """Of the tensors of a saved transformer whose 16-bit weights came in 16 bits."""
    codes = scales = modulation = vectors = 0
    for path, rows, columns in linears(config):
        if is_block_linear(path):
            codes += rows * columns * layout.bits // 8
            # MLX's packing repeats a row's scale for each of its groups, and once more times −8.
            scales += 2 * FLOAT * rows * (columns // group_size(columns))
            vectors += vector_bytes(path, rows, columns, layout, SIXTEEN)
        elif MODULATION in path:
            modulation += modulation_bytes(rows, columns, layout)
    return Bytes(codes, scales, modulation, other_parameters(config) * SIXTEEN, vectors)


def resident_bytes(
    config: MMDiTConfig,
    layout: Layout,
    *,
    low_memory: bool,
    levels: int = 28,
    rows: int = 2,
    float_bytes: int = SIXTEEN,
) -> Bytes:
    """Of what stays in memory from step to step, with the kernel quantized_matmul.

    `levels` are the sampler's steps and `rows` those of its batch, guidance included; floats are 4
    bytes wide on the CPU. What a step needs for a while, which grows with the picture, comes on
    top.
    """
    codes = scales = modulation = vectors = 0
    for path, outputs, columns in linears(config):
        if is_block_linear(path):
            codes += outputs * columns * layout.bits // 8
            scales += 2 * FLOAT * outputs  # as they were given, and ready for the product
            vectors += vector_bytes(path, outputs, columns, layout, FLOAT)
            vectors += 3 * FLOAT * max(0, 2 * layout.steps - 1)  # the table, spread
        elif MODULATION in path and low_memory:
            modulation += levels * rows * outputs * float_bytes
        elif MODULATION in path:
            modulation += modulation_bytes(outputs, columns, layout, float_bytes)
    left_out = EMBEDDERS if low_memory else ()
    positions = config.position_size**2 * config.hidden
    others = other_parameters(config, left_out) - positions
    return Bytes(codes, scales, modulation, others * float_bytes + positions * SIXTEEN, vectors)


def linears(config: MMDiTConfig) -> Iterator[tuple[str, int, int]]:
    """Path, outputs and inputs of every linear; no weight is made."""
    for path, module in MMDiT(config).named_modules():
        if isinstance(module, nn.Linear):
            yield path, *module.weight.shape


def is_block_linear(path: str) -> bool:
    return "_transformer_block." in path and MODULATION not in path


def other_parameters(config: MMDiTConfig, left_out: tuple[str, ...] = ()) -> int:
    """How many numbers no quantized layer holds."""
    quantized = {path for path, _, _ in linears(config) if "_transformer_block." in path}
    return sum(
        tensor.size
        for name, tensor in tree_flatten(MMDiT(config).parameters())
        if name.rpartition(".")[0] not in quantized
        and MODULATION not in name
        and not name.startswith(left_out or ("no such name",))
    )


def modulation_bytes(rows: int, columns: int, layout: Layout, float_bytes: int = SIXTEEN) -> int:
    """Weight and bias; scales and biases of the groups are floats as all others."""
    if layout.modulation_bits == 16:
        return float_bytes * rows * (columns + 1)
    groups = columns // group_size(columns, layout.modulation_group)
    return rows * columns * layout.modulation_bits // 8 + float_bytes * rows * (2 * groups + 1)


def vector_bytes(path: str, rows: int, columns: int, layout: Layout, bias_bytes: int) -> int:
    """Bias, activation table and shift; a bias that makes up for a shift is in 32 bits."""
    shifted = layout.shifted and layout.steps > 0 and path.endswith("fc2")
    table = 2 * FLOAT * layout.steps
    return rows * (FLOAT if shifted else bias_bytes) + table + shifted * FLOAT * columns
