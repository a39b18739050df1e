"""Layers timed under each kernel, at several numbers of rows: what kernels are chosen by."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..backends import named
from ..backends.fusing import Fusing
from ..backends.tuning import Point, table_of
from ..models.load import default_dtype
from ..models.pipeline import compiling_is_faster
from ..quant.artifacts import LayerConfig
from ..quant.linear import QuantizedLinear, Runtime
from .timing import in_turns, refusal_of

GRID = LayerConfig([8], [0.05])
SHORTEST = 2e-3  # seconds that are timed at once
MOST_CALLS = 50
MOST_BYTES = 2**28  # of outputs that are there at once
TOO_SLOW = 8  # times the fastest; such a kernel is not measured with more rows
FEW = 8  # rows, below which none is left out

Call = Callable[[], mx.array]
Layer = Callable[[mx.array], mx.array]
Say = Callable[[str], object]
Made = TypeVar("Made")


def measured(
    names: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    rounds: int,
    seconds: float,
    say: Say,
) -> Iterator[Point]:
    """A point a shape and number of rows; the first of each shape whatever time it takes. A kernel
    that MLX refuses is left out of its shape from there on, and `say` is told."""
    end = time.monotonic() + seconds
    layers = {shape: layers_of(names, *shape, say) for shape in shapes}
    for count in rows:
        for (N, K), calls in layers.items():
            if not calls or (count > rows[0] and time.monotonic() > end):
                continue
            x = mx.random.normal((1, count, K), key=mx.random.key(0)).astype(default_dtype())
            mx.eval(x)
            bound = {name: lambda call=call, x=x: call(x) for name, call in calls.items()}
            found = times_of(bound, count * N, rounds, say)
            fastest = min(found.values(), default=math.inf)
            for name in bound:
                if name not in found or (count >= FEW and found[name] > TOO_SLOW * fastest):
                    del calls[name]
            if found:
                yield Point(count, N, K, found)


def layers_of(names: Sequence[str], N: int, K: int, say: Say) -> dict[str, Layer]:
    """The same W4A8 layer under each kernel that multiplies it by itself."""
    linear = nn.Linear(K, N)
    linear.set_dtype(default_dtype())
    made = those_that_run({name: partial(layer_of, linear, name) for name in names}, say)
    return {name: layer for name, layer in made.items() if layer is not None}


def layer_of(linear: nn.Linear, name: str) -> Layer | None:
    """Compiled where a pipeline is; none where the kernel would leave the layer to another, which
    would be timed under its name."""
    backend = named(name)
    layer = QuantizedLinear.from_linear(linear, grid=GRID, runtime=Runtime(backend=backend))
    if isinstance(backend, Fusing) and not layer.fuses:
        return None
    mx.eval(layer.parameters())
    return mx.compile(layer, inputs=layer.state) if compiling_is_faster() else layer


def times_of(calls: Mapping[str, Call], outputs: int, rounds: int, say: Say) -> dict[str, float]:
    """Median seconds of each that runs, in turns; short ones are queued, many at once."""
    begun = {name: partial(repeated, call, outputs) for name, call in calls.items()}
    found = in_turns(those_that_run(begun, say), rounds)
    return {name: float(np.median(values)) for name, values in found.items()}


def those_that_run(calls: Mapping[str, Callable[[], Made]], say: Say) -> dict[str, Made]:
    """What each kernel's call gives, but for those that MLX refuses."""
    given: dict[str, Made] = {}
    for name, call in calls.items():
        reason = refusal_of(lambda name=name, call=call: given.update({name: call()}))
        if reason is not None:
            say(f"{name} is not measured: {reason}")
    return given


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
