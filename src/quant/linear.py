"""The quantized linear: packed codes, an activation grid for every step, any backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..backends import Backend, Device, Weight, choose
from ..errors import UserError
from .artifacts import LayerConfig, RoundedLayer
from .fused import Fused
from .grid import (
    SMALLEST_SCALE,
    absmax_scale,
    activation_limit,
    coarse_limit,
    nearest_codes,
    whole,
)
from .packing import pack_codes
from .schedule import Schedule, Step, spread_table
from .simulate import two_region_codes

A_SCALES = ("static", "token")
TYPICAL_ROWS = 1024  # tokens that a picture has, where nobody says how many there will be


@dataclass(frozen=True)
class Runtime:
    """How layers run: what they share, and how their activations are scaled.

    Without a backend, each layer gets the one that suits its shape and `rows`.
    """

    step: Step | None = None
    a_scale: str = "static"  # or token: from each token's own largest value
    backend: Backend | None = None
    rows: int = TYPICAL_ROWS
    weights_only: bool = False  # inputs are shifted and smoothed, but stay in floats

    def __post_init__(self) -> None:
        if self.a_scale not in A_SCALES:
            raise UserError(f"unknown --a-scale {self.a_scale!r}; valid: {', '.join(A_SCALES)}")


class PlainCodes(NamedTuple):
    """An input as backends multiply it that do not quantize by themselves."""

    codes: mx.array  # or floats
    factor: mx.array | None  # what one of them is worth
    centred: mx.array  # the input itself, shifted and smoothed


class QuantizedLinear(Fused, nn.Module):
    """y = s·a·Σ c·x̂ + b_t, with x̂ = clip(round((x − z_t) / m / a), −Q, Q).

    c are the weight's codes and s its scales; a, Q and z_t are the step's, m is the smoothing and
    b_t = b + W z_t. Without an activation grid, or with weights only, the input stays in floats:
    y = s·Σ c·(x − z_t) / m + b_t.
    """

    def __init__(
        self,
        weight: Weight,
        *,
        bias: mx.array | None = None,
        grid: LayerConfig | None = None,
        smoothing: mx.array | None = None,
        low_rank: tuple[mx.array, mx.array] | None = None,
        dtype: mx.Dtype = mx.float32,
        runtime: Runtime | None = None,
    ) -> None:
        """`bias` is b_t: (steps, rows), or (1, rows) where no step changes it.

        `low_rank` are (rank, columns) and (rows, rank) matrices whose product is added to the
        codes' weight, kept as they are; `dtype` is what the 16-bit model computes in.
        """
        super().__init__()
        self.bits = weight.bits
        self.weight, self.scales = weight.packed, weight.scales.astype(mx.float32)
        if bias is not None:
            self.bias = bias.astype(mx.float32)
        if smoothing is not None:
            self.smoothing = smoothing.astype(mx.float32)
        if low_rank is not None:
            self.low_rank_down, self.low_rank_up = low_rank
        if grid is not None:
            self.a_scale = mx.array(np.asarray(grid.scale, dtype=np.float32))
            self.a_bits = mx.array(np.asarray(grid.bits, dtype=np.int32))
            self._coarse = (grid.coarse, grid.coarse_sides)
            if grid.shift is not None:
                self.shift = mx.array(np.atleast_2d(grid.shift).astype(np.float32))
        self.freeze()
        self.prepare(runtime or Runtime(), dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        bits: int = 4,
        group_size: int = 0,
        grid: LayerConfig | None = None,
        low_rank: tuple[mx.array, mx.array] | None = None,
        runtime: Runtime | None = None,
    ) -> QuantizedLinear:
        """With the nearest codes. `low_rank` is taken from the smoothed weight before rounding."""
        smoothing = None if grid is None else as_float32(grid.smoothing)
        weight = linear.weight.astype(mx.float32)
        if smoothing is not None:
            weight = weight * smoothing
        if low_rank is not None:
            down, up = (part.astype(mx.float32) for part in low_rank)
            weight = weight - up @ down
        scale = absmax_scale(weight, bits, group_size)
        packed = pack_codes(nearest_codes(weight, scale, bits), bits)
        return cls(
            Weight(packed, scale, bits),
            bias=step_bias(linear, linear.get("bias"), grid),
            grid=grid,
            smoothing=smoothing,
            low_rank=low_rank,
            dtype=linear.weight.dtype,
            runtime=runtime,
        )

    @classmethod
    def from_artifacts(
        cls,
        linear: nn.Linear,
        rounded: RoundedLayer,
        *,
        bits: int = 4,
        grid: LayerConfig | None = None,
        runtime: Runtime | None = None,
    ) -> QuantizedLinear:
        """With the weight track's codes; `linear` is the 16-bit layer that they were made from.

        The grid's smoothing must be the one that the weight was rounded with.
        """
        check_shapes(linear, rounded)
        if grid is not None and not same_vector(grid.smoothing, rounded.smoothing):
            raise ValueError("the grid's smoothing is not the one that the weight was rounded with")
        bias = linear.get("bias") if rounded.bias is None else mx.array(rounded.bias)
        return cls(
            Weight(pack_codes(rounded.codes, bits), mx.array(rounded.scale), bits),
            bias=step_bias(linear, bias, grid),
            grid=grid,
            smoothing=as_float32(rounded.smoothing),
            dtype=linear.weight.dtype,
            runtime=runtime,
        )

    def prepare(self, runtime: Runtime, dtype: mx.Dtype) -> None:
        """Chooses the backend and derives what is kept beside the parameters."""
        quantizes = "a_scale" in self and not runtime.weights_only
        largest = self.largest_code() if quantizes else None
        self._runtime = runtime
        self._backend = runtime.backend or choose(self.packed, runtime.rows, largest)
        self._quantizes, self._per_token = quantizes, runtime.a_scale == "token"
        # On the CPU 16-bit products are slow.
        self._dtype = mx.float32 if Device.here().kind == "cpu" else dtype
        if "a_scale" in self:
            self._step = runtime.step or Step(Schedule((1.0,)))
            self.check_steps()
            table = spread_table(np.array(self.a_scale).tolist(), self.a_bits.tolist())
            self._number = self._step.add(table)
        self.expect(largest)

    def expect(self, largest: int | None) -> None:
        """Prepares `multiply` for codes of up to `largest`, or for floats (None)."""
        self._operand = self._backend.prepare(self.packed, self._dtype, largest)
        self.prepare_fusion()

    @property
    def packed(self) -> Weight:
        """The codes and scales, as backends take them."""
        return Weight(self.weight, self.scales, self.bits)

    @property
    def columns(self) -> int:
        """Input channels."""
        return self.packed.columns

    @property
    def kernel(self) -> str:
        """Name of the backend that multiplies."""
        return self._backend.name

    @property
    def runtime(self) -> Runtime:
        """As it was given: its backend is none where each layer has chosen its own."""
        return self._runtime

    @property
    def grid(self) -> LayerConfig | None:
        """The activation grid that the layer was made with, smoothing included."""
        if "a_scale" not in self:
            return None
        shift = np.array(self.shift) if "shift" in self else None
        return LayerConfig(
            self.a_bits.tolist(),
            self.a_scale.tolist(),
            shift[0] if shift is not None and len(shift) == 1 else shift,
            np.array(self.smoothing) if "smoothing" in self else None,
            *self._coarse,
        )

    def largest_code(self) -> int:
        """Of the input, at any step: whole numbers, also where some are multiples of `coarse`."""
        bits, (coarse, sides) = int(self.a_bits.max()), self._coarse
        return activation_limit(bits) if coarse == 1 else coarse * coarse_limit(bits, sides)

    def check_steps(self) -> None:
        """Raises unless the step's schedule is the one that the tables are about."""
        steps, known = len(self.a_scale), len(self._step.schedule.sigmas)
        tables = {"shift": self.get("shift"), "bias": self.get("bias")}
        if steps != known or any(
            t is not None and len(t) not in (1, steps) for t in tables.values()
        ):
            raise UserError(
                f"a layer's grid has {steps} steps, its schedule has {known}; give the schedule "
                "that the grid was made for"
            )

    def __setitem__(self, key: str, value: Any) -> None:
        """A cast of the whole model leaves the layer alone: its dtypes are part of its numbers."""
        held = self.get(key)
        if isinstance(held, mx.array) and isinstance(value, mx.array) and held.dtype != value.dtype:
            return
        super().__setitem__(key, value)

    def unfreeze(self, *args: Any, **kwargs: Any) -> QuantizedLinear:
        """Codes cannot be trained: stays frozen, as MLX's own quantized layers do."""
        super().unfreeze(*args, **kwargs)
        return self.freeze(recurse=False)

    def _extra_repr(self) -> str:
        rows, columns = len(self.weight), self.weight.shape[1] * 32 // self.bits
        text = f"input_dims={columns}, output_dims={rows}, bias={'bias' in self}, bits={self.bits}"
        if self.scales.shape[1] > 1:
            text += f", group_size={columns // self.scales.shape[1]}"
        if self._quantizes:
            tiers = "/".join(f"A{bits}" for bits in sorted(set(self.a_bits.tolist())))
            text += f", activations={tiers} per {'token' if self._per_token else 'step'}"
        for part in ("shift", "smoothing"):
            text += f", {part}" if part in self else ""
        if "low_rank_up" in self:
            text += f", low_rank={self.low_rank_up.shape[1]}"
        return f"{text}, kernel={self.kernel}"

    def __call__(self, x: mx.array) -> mx.array:
        """(…, columns) to (…, rows), in the dtype of x; what precedes the tokens is the batch."""
        if x.ndim == 1:
            return self(x[None])[0]
        if x.size == 0:
            self.check_input(x)
            return mx.zeros((*x.shape[:-1], len(self.weight)), dtype=x.dtype)
        return self.of_codes(x, self.codes(x))

    def plain_codes(self, x: mx.array) -> PlainCodes:
        """What `quantized` makes of the input, or the input itself where it stays in floats."""
        centred = self.centred(x)
        return PlainCodes(
            *(self.quantized(centred) if self._quantizes else (centred, None)), centred
        )

    def of_plain_codes(self, x: mx.array, found: PlainCodes) -> mx.array:
        """The output for x, whose codes these are."""
        y = self.multiply(found.codes, found.factor)
        if "low_rank_up" in self:
            y = y + self.low_rank(found.centred, x.dtype)
        if "bias" in self:
            y = y + self.bias_here(x.ndim)
        return y.astype(x.dtype)

    def multiply(self, codes: mx.array, factor: mx.array | None) -> mx.array:
        """factor·Σ s·c·codes in float32: nothing is added. Without a factor the input is floats."""
        return self._backend.multiply(codes, factor, self._operand)

    def low_rank(self, centred: mx.array, dtype: mx.Dtype) -> mx.array:
        """The branch's product, which takes its input in floats; float32."""
        thin = centred.astype(dtype) @ self.low_rank_down.T.astype(dtype)
        return (thin @ self.low_rank_up.T.astype(dtype)).astype(mx.float32)

    def bias_here(self, ndim: int) -> mx.array:
        """b_t for an input of that many dimensions."""
        return self.bias.squeeze(0) if len(self.bias) == 1 else self._step.vector(self.bias, ndim)

    def centred(self, x: mx.array) -> mx.array:
        """(x − z_t) / m, in float32 where there is anything to do."""
        if "shift" in self:
            x = x.astype(mx.float32) - self._step.vector(self.shift, x.ndim)
        if "smoothing" in self:
            x = x.astype(mx.float32) / self.smoothing
        return x

    def quantized(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """float32 codes, and what one of them is worth.

        In a grid of two regions (LayerConfig) some are multiples of its `coarse`; a token's own
        scale needs no second region. NaN stays NaN; infinity is as any value beyond the range: in
        a static grid the last code.
        """
        x = x.astype(mx.float32)
        scale, limit = self._step.grid(self._number, x.ndim)
        if self._per_token:
            largest = mx.abs(x).max(axis=-1, keepdims=True)
            scale = mx.maximum(largest / limit, SMALLEST_SCALE)
        elif self._coarse[0] > 1:
            fine, coarse = (limit - 1) / 2, limit if self._coarse[1] == 1 else (limit - 1) / 2
            return two_region_codes(x / scale, fine, coarse, *self._coarse), scale
        return mx.clip(whole(x / scale), -limit, limit), scale


def step_bias(
    linear: nn.Linear, bias: mx.array | None, grid: LayerConfig | None
) -> mx.array | None:
    """b_t = b + W z_t as (steps or 1, rows) float32, from the 16-bit weight."""
    bias = None if bias is None else bias.astype(mx.float32)[None]
    if grid is None or grid.shift is None:
        return bias
    # Summed in float64: a large shift meets a small bias, and a GPU's float32 may be rough.
    weight = np.array(linear.weight.astype(mx.float32), dtype=np.float64)
    moved = np.atleast_2d(grid.shift).astype(np.float64) @ weight.T
    total = moved if bias is None else moved + np.array(bias, dtype=np.float64)
    return mx.array(total.astype(np.float32))


def as_float32(vector: np.ndarray | None) -> mx.array | None:
    return None if vector is None else mx.array(np.asarray(vector, dtype=np.float32))


def same_vector(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def check_shapes(linear: nn.Linear, rounded: RoundedLayer) -> None:
    """Raises unless the rounded layer is of the linear's shape."""
    rows, columns = linear.weight.shape
    groups = rounded.scale.shape[1]
    wanted: Mapping[str, tuple[int, ...]] = {
        "codes": (rows, columns),
        "scale": (rows, groups),
        "bias": (rows,),
        "smoothing": (columns,),
    }
    for name, shape in wanted.items():
        value = getattr(rounded, name)
        if value is not None and value.shape != shape:
            raise UserError(
                f"{name} of the rounded weight has shape {value.shape}, the model's layer needs "
                f"{shape}; round this model's weights again"
            )
    if groups == 0 or columns % groups:
        raise UserError(f"{groups} groups of scales do not divide {columns} input channels")
