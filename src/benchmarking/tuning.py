"""Layers timed under each kernel, at several numbers of rows: what kernels are chosen by."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..backends import named
from ..backends.tuning import Point, table_of
from ..models.load import default_dtype
from ..models.pipeline import compiling_is_faster
from ..quant.artifacts import LayerConfig
from ..quant.linear import QuantizedLinear, Runtime
from .timing import in_turns

GRID = LayerConfig([8], [0.05])
SHORTEST = 2e-3  # seconds that are timed at once
MOST_CALLS = 50
MOST_BYTES = 2**28  # of outputs that are there at once
TOO_SLOW = 8  # times the fastest; such a kernel is not measured with more rows
FEW = 8  # rows, below which none is left out

Call = Callable[[], mx.array]


def measured(
    names: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    rounds: int,
    seconds: float,
) -> Iterator[Point]:
    """A point a shape and number of rows; the first of each shape whatever time it takes."""
    end = time.monotonic() + seconds
    layers = {shape: layers_of(names, *shape) for shape in shapes}
    for count in rows:
        for (N, K), calls in layers.items():
            if count > rows[0] and time.monotonic() > end:
                continue
            x = mx.random.normal((1, count, K), key=mx.random.key(0)).astype(default_dtype())
            mx.eval(x)
            bound = {name: lambda call=call, x=x: call(x) for name, call in calls.items()}
            point = Point(count, N, K, times_of(bound, count * N, rounds))
            fastest = min(point.seconds.values())
            for name, taken in point.seconds.items():
                if count >= FEW and taken > TOO_SLOW * fastest:
                    del calls[name]
            yield point


def layers_of(names: Sequence[str], N: int, K: int) -> dict[str, Callable[[mx.array], mx.array]]:
    """The same W4A8 layer under each kernel, compiled where a pipeline is."""
    linear = nn.Linear(K, N)
    linear.set_dtype(default_dtype())
    layers = {}
    for name in names:
        layer = QuantizedLinear.from_linear(linear, grid=GRID, runtime=Runtime(backend=named(name)))
        mx.eval(layer.parameters())
        layers[name] = mx.compile(layer, inputs=layer.state) if compiling_is_faster() else layer
    return layers


def times_of(calls: Mapping[str, Call], outputs: int, rounds: int) -> dict[str, float]:
    """Median seconds of each, in turns; short ones are queued, many at once."""
    timed = {name: repeated(call, outputs) for name, call in calls.items()}
    found = in_turns(timed, rounds)
    return {name: float(np.median(values)) for name, values in found.items()}


def repeated(call: Call, outputs: int) -> Callable[[], float]:
    """Seconds of one of as many calls as take long enough to be timed; the first ones compile."""
    mx.eval(call())
    start = time.perf_counter()
    mx.eval(call())
    wanted = math.ceil(SHORTEST / max(time.perf_counter() - start, 1e-9))
    count = max(1, min(wanted, MOST_CALLS, MOST_BYTES // (4 * outputs)))

    def timed() -> float:
        begun = time.perf_counter()
        mx.eval([call() for _ in range(count)])
        return (time.perf_counter() - begun) / count

    return timed


def lines_of(points: Sequence[Point]) -> list[str]:
    """Milliseconds, and what will be chosen where nothing else is asked for."""
    names = list(dict.fromkeys(name for point in points for name in point.seconds))
    lines = [f"{'N':>5} {'K':>5} {'rows':>5} {' '.join(f'{name:>16}' for name in names)}  ms"]
    for point in sorted(points, key=lambda point: (point.shape, point.rows)):
        cells = (f"{1e3 * t:16.3f}" if (t := point.seconds.get(n)) else 16 * " " for n in names)
        lines.append(f"{point.N:5} {point.K:5} {point.rows:5} {' '.join(cells)}")
    for (N, K), found in table_of(points).items():
        words = ", ".join(f"from {start} rows on {name}" for start, name in found)
        lines.append(f"N {N}, K {K}: {words}")
    return lines
