"""Layers timed under each kernel, at several numbers of rows: what kernels are chosen by.

What MLX compiles at a first call is no part of a measurement: its products of packed weights and
every compiled function take seconds each, once a machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..backends import named
from ..backends.fusing import Fusing
from ..backends.tuning import Point, best, table_of
from ..models.load import default_dtype
from ..models.pipeline import compiling_is_faster
from ..quant.artifacts import LayerConfig
from ..quant.linear import QuantizedLinear, Runtime
from .timing import in_turns, refusal_of, seconds_of

GRID = LayerConfig([8], [0.05])
SHORTEST = 2e-3  # seconds that are timed at once
MOST_CALLS = 50
MOST_BYTES = 2**28  # of outputs that are there at once
PROBE = 32  # rows at which it is seen how long more of them would take
TOO_SLOW = 8  # times the fastest; such a kernel is left out where it would take long
# Times the seconds of measuring, after which nothing more is begun; more than 1 where kernels are
# compiled.
LONGEST = 4

Call = Callable[[], list[mx.array]]
Queue = Callable[[int], Call]  # of so many products, one after the other
Say = Callable[[str], object]
Made = TypeVar("Made")


@dataclass
class Budget:
    """Seconds that may be spent on measuring; what is compiled counts only towards `longest`."""

    seconds: float
    spent: float = 0.0
    begun: float = field(default_factory=time.monotonic)
    longest: float = field(default_factory=lambda: LONGEST if compiling_is_faster() else 1)

    def is_over(self) -> bool:
        return max(self.spent, (time.monotonic() - self.begun) / self.longest) > self.seconds

    def counted(self, call: Callable[[], Made]) -> Made:
        start = time.monotonic()
        try:
            return call()
        finally:
            self.spent += time.monotonic() - start


@dataclass
class Subject:
    """A shape's layers by kernel, how long each takes at PROBE rows, and what was measured."""

    shape: tuple[int, int]
    layers: dict[str, QuantizedLinear]
    pace: dict[str, float]
    fastest: dict[int, str] = field(default_factory=dict)  # by number of rows

    def names(self, count: int, most: float) -> list[str]:
        """The kernels to measure with so many rows: without those far behind that would take more
        than `most` seconds a call."""
        times = {n: self.pace[n] * max(1.0, count / PROBE) for n in self.layers}
        least = min(times.values(), default=0.0)
        return [n for n, t in times.items() if t <= max(most, TOO_SLOW * least)]

    def reach(self, rows: Sequence[int], most: float) -> list[int]:
        """As many rows as take no more than that, and the fewest whatever they take."""
        slowest = [max((self.pace[n] for n in self.names(r, most)), default=0.0) for r in rows]
        times = [pace * max(1.0, r / PROBE) for r, pace in zip(rows, slowest, strict=True)]
        return [r for r, t in zip(rows, times, strict=True) if t <= most or r == rows[0]]


def measured(
    names: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    rounds: int,
    seconds: float,
    say: Say,
) -> Iterator[Point]:
    """A point a shape and number of rows, which rise: the most rows of each shape first, shapes in
    their order, then those that tell most (`next_rows`). The first of each shape whatever time it
    takes. `say` is told, once, of a kernel that MLX refuses."""
    budget, say = Budget(seconds), once(say)
    most = seconds / (2 * len(shapes) * (rounds + 2))  # a size takes a part of what there is
    subjects: dict[tuple[int, int], Subject] = {}
    left = list(dict.fromkeys(shapes))
    while left:
        for shape in list(left):
            if shape not in subjects:
                subjects[shape] = subject_of(names, shape, rows[-1], say)
            subject = subjects[shape]
            count = next_rows(subject.fastest, subject.reach(rows, most))
            if count is None or not subject.layers or (subject.fastest and budget.is_over()):
                left.remove(shape)
                continue
            queues = queues_of(subject, subject.names(count, most), count)
            found = times_of(queues, count * shape[0], rounds, budget, say)
            subject.fastest[count] = best([found], list(found)) if found else ""
            if found:
                yield Point(count, *shape, found)


def once(say: Say) -> Say:
    """Says nothing twice."""
    said: set[str] = set()

    def say_new(line: str) -> None:
        if line not in said:
            said.add(line)
            say(line)

    return say_new


def next_rows(fastest: Mapping[int, str], rows: Sequence[int]) -> int | None:
    """What to measure where the fastest of some numbers of rows is known: the most rows, the
    fewest, then what halves a span within which another becomes the fastest, then the widest."""
    for end in (rows[-1], rows[0]):
        if end not in fastest:
            return end
    known = [place for place, count in enumerate(rows) if count in fastest]
    spans = [(low, high) for low, high in zip(known, known[1:], strict=False) if high - low > 1]
    if not spans:
        return None

    def tells(span: tuple[int, int]) -> tuple[bool, int, int]:
        low, high = span
        return fastest[rows[low]] != fastest[rows[high]], high - low, high

    return rows[sum(max(spans, key=tells)) // 2]


def subject_of(names: Sequence[str], shape: tuple[int, int], rows: int, say: Say) -> Subject:
    """Made and run twice: the first call compiles, the second shows its pace."""
    subject = Subject(shape, layers_of(names, *shape, say), {})
    queues = queues_of(subject, list(subject.layers), min(PROBE, rows))
    paces = {name: seconds_of(one)() for name, one in those_that_begin(queues, say).items()}
    slowest = max(paces.values(), default=0.0)  # of one that was refused nothing is known
    subject.pace |= dict.fromkeys(subject.layers, slowest) | paces
    return subject


def queues_of(subject: Subject, names: Sequence[str], count: int) -> dict[str, Queue]:
    """Of these kernels, with inputs of so many rows."""
    x = mx.random.normal((1, count, subject.shape[1]), key=mx.random.key(0))
    x = x.astype(default_dtype())
    mx.eval(x)
    return {name: queue_of(subject.layers[name], x) for name in names}


def queue_of(layer: QuantizedLinear, x: mx.array) -> Queue:
    """Compiled as one where a pipeline is: a call by itself takes longer than a small product."""

    def products(*inputs: mx.array) -> list[mx.array]:
        return [layer(each) for each in inputs]

    def queue(count: int) -> Call:
        compiled = compiling_is_faster()
        run = mx.compile(products, inputs=layer.state) if compiled else products
        return lambda: run(*[x] * count)

    return queue


def layers_of(names: Sequence[str], N: int, K: int, say: Say) -> dict[str, QuantizedLinear]:
    """The same W4A8 layer under each kernel that multiplies it by itself."""
    linear = nn.Linear(K, N)
    linear.set_dtype(default_dtype())
    made = those_that_run({name: partial(layer_of, linear, name) for name in names}, say)
    return {name: layer for name, layer in made.items() if layer is not None}


def layer_of(linear: nn.Linear, name: str) -> QuantizedLinear | None:
    """None where the kernel would leave the layer to another, which would be timed under its
    name."""
    backend = named(name)
    layer = QuantizedLinear.from_linear(linear, grid=GRID, runtime=Runtime(backend=backend))
    if isinstance(backend, Fusing) and not layer.fuses:
        return None
    mx.eval(layer.parameters())
    return layer


def times_of(
    queues: Mapping[str, Queue], outputs: int, rounds: int, budget: Budget, say: Say
) -> dict[str, float]:
    """Median seconds of each that runs, in turns; short ones are queued, many at once."""
    ready = those_that_begin(queues, say)
    calls = {name: repeated(one, queues[name], outputs) for name, one in ready.items()}
    found = budget.counted(lambda: in_turns(calls, rounds))
    return {name: float(np.median(values)) for name, values in found.items()}


def those_that_begin(queues: Mapping[str, Queue], say: Say) -> dict[str, Call]:
    """A single product of each that runs; its first call, which compiles, has been."""

    def begun(queue: Queue) -> Call:
        call = queue(1)
        mx.eval(call())
        return call

    return those_that_run({n: partial(begun, queue) for n, queue in queues.items()}, say)


def those_that_run(calls: Mapping[str, Callable[[], Made]], say: Say) -> dict[str, Made]:
    """What each kernel's call gives, but for those that MLX refuses."""
    given: dict[str, Made] = {}
    for name, call in calls.items():
        reason = refusal_of(lambda name=name, call=call: given.update({name: call()}))
        if reason is not None:
            say(f"{name} is not measured: {reason}")
    return given


def repeated(one: Call, queue: Queue, outputs: int) -> Callable[[], float]:
    """Seconds of one of as many products as take long enough to be timed."""
    wanted = math.ceil(SHORTEST / max(seconds_of(one)(), 1e-9))
    count = max(1, min(wanted, MOST_CALLS, MOST_BYTES // (4 * outputs)))
    many = queue(count)
    mx.eval(many())
    timed = seconds_of(many)
    return lambda: timed() / count


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
