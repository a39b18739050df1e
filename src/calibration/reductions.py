"""What is kept of one input of a linear, reduced where the forward pass runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from . import histogram
from .reduction_kernel import reduce_on_cuda

CENTRED = "hist_centred"
MOMENTS = ("minimum", "maximum", "mean", "square")
HISTOGRAMS = ("hist", CENTRED)

# (MOMENTS, samples, channels) float32, and per histogram its counts, (…, samples, BINS), or the bin
# numbers that are still to be counted, (…, samples, values).
Reduced = tuple[mx.array, mx.array]
Shape = tuple[int, ...]
Shapes = dict[str, tuple[Shape, Shape]]  # of what was reduced of each input
Sample = dict[str, np.ndarray]  # name of a statistic to its values, for one input and sample


def reduction(samples: int, centred: bool) -> Callable[[mx.array], Reduced]:
    """The reductions of an input as this device does them best, for `samples_of` to read."""
    if mx.default_device() == mx.Device(mx.cpu):
        return partial(reduce_input, samples=samples, centred=centred, counts=numbers)
    by = reduce_on_cuda if mx.cuda.is_available() else reduce_input
    return partial(by, samples=samples, centred=centred)


def numbers(values: mx.array) -> mx.array:
    """Bin numbers, which NumPy counts after the forward pass 20 times as fast as MLX on a CPU."""
    return histogram.bin_numbers(values).astype(mx.uint16)


def reduce_input(
    x: mx.array,
    samples: int,
    centred: bool,
    counts: Callable[[mx.array], mx.array] = histogram.count,
) -> Reduced:
    """MLX's own reductions; of each histogram what `counts` makes of a choice of the values."""
    channels = x.shape[-1]
    # Rows of a sample lie apart: prompts come first, then the negatives.
    x = x.reshape(-1, samples, x.size // (channels * len(x)), channels).astype(mx.float32)
    halves, _, tokens, _ = x.shape
    evenly = mx.full((1, tokens), 1 / (halves * tokens))

    def over_tokens(reduction: Callable[..., mx.array]) -> mx.array:
        return reduction(reduction(x, axis=2), axis=0)

    def mean(values: mx.array) -> mx.array:
        return (evenly @ values).sum(axis=0)[:, 0]  # a product is the fastest sum over tokens

    stride = histogram.counting_stride(halves * tokens * channels, channels)

    def histogram_of(values: mx.array) -> mx.array:
        counted = values.reshape(halves, samples, -1)[:, :, ::stride]
        return counts(counted.swapaxes(0, 1).reshape(samples, -1))

    moments = [over_tokens(mx.min), over_tokens(mx.max), mean(x), mean(x * x)]
    counted = [histogram_of(x)]
    if centred:
        centre = 0.5 * (moments[0] + moments[1])
        counted.append(histogram_of(x - centre[:, None]))
    return mx.stack(moments), mx.stack(counted)


def packed(found: dict[str, Reduced]) -> tuple[mx.array, mx.array]:
    """All moments and all counts, one input's behind the other's: two copies take them along."""
    parts = zip(*(found[path] for path in sorted(found)), strict=True)
    return tuple(mx.concatenate([array.reshape(-1) for array in arrays]) for arrays in parts)


def samples_of(flat: Sequence[mx.array], shapes: Shapes, samples: int) -> list[dict[str, Sample]]:
    """What was packed, off the device: by sample, then by input."""
    paths = sorted(shapes)
    moments, counts = (
        split(np.array(array), [shapes[path][which] for path in paths])
        for which, array in enumerate(flat)
    )
    return [
        {path: sample_at(row, *own) for path, *own in zip(paths, moments, counts, strict=True)}
        for row in range(samples)
    ]


def sample_at(row: int, moments: np.ndarray, counts: np.ndarray) -> Sample:
    own = counts[:, row]
    if own.dtype == np.uint16:
        own = histogram.tally(own)
    return dict(zip([*MOMENTS, *HISTOGRAMS[: len(own)]], [*moments[:, row], *own], strict=True))


def split(flat: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
    """Arrays of these shapes, one behind the other."""
    parts = np.split(flat, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
