"""What goes into every linear, step by step: ranges, moments and histograms per channel.

The reductions are part of the forward pass and run where it runs; raw activations never leave the
device. A sample is one step of one image, the prompt's and the negative's rows together. All that
is kept is kept per sample, so that any split over processes and batches folds to the same numbers:
minima, maxima and counts do not ask for an order, and what does (the moving shift, the sums'
rounding) is folded in the order of the images.

timestep_stats/step_N.npz holds, per input and under `{path}__{name}`:

minimum, maximum   (channels,) over all samples
avg_min, avg_max   (channels,) means of the samples' minima and maxima
mean, square       (channels,) E[x] and E[x²]
hist               (BINS,) counts of |x|, see histogram.py
shift              (channels,) post-GELU inputs only: moving centre of the samples' ranges
hist_centred       (BINS,) post-GELU inputs only: counts of |x - centre of the sample's range|
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import UserError
from ..lanes import lanes
from ..models.mmdit import MMDiT
from ..models.paths import block_linears, input_of, replaced
from ..models.pipeline import compiling_is_faster
from ..store import load_npz
from ..store.arrays import Expected
from .reductions import CENTRED, Reduced, Sample, Shapes, packed, reduction, samples_of
from .replay import Inputs

SHIFT_MOMENTUM = 0.95


def is_post_gelu(path: str) -> bool:
    """Whether the linear's input is what GELU gives: bounded below, so off centre."""
    return path.endswith("mlp.fc2")


def input_paths(model: MMDiT) -> dict[str, str]:
    """Every quantisable linear's path, and the path under which its input is recorded."""
    return {path: input_of(path) for path in block_linears(model)}


class Tap(nn.Module):
    """A linear that shows its input to an observer first."""

    def __init__(self, linear: nn.Module, observe: Callable[[mx.array], mx.array]) -> None:
        super().__init__()
        self.linear = linear
        self._observe = observe

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(self._observe(x))


def collect(model: MMDiT, inputs: Inputs, samples: int) -> list[dict[str, Sample]]:
    """One forward; for each sample, the statistics of every distinct input.

    `inputs` holds the samples' rows, then (under guidance) as many of their negatives.
    """
    (found,) = Collector(model).collected([(inputs, samples)])
    return found


class Collector:
    """`collect` for many batches: one computes while the one before is read by another thread."""

    def __init__(self, model: MMDiT) -> None:
        self.model = model
        self._forwards: dict[tuple[object, ...], ReducingForward] = {}  # by the inputs' shapes

    def collected(self, batches: Iterable[tuple[Inputs, int]]) -> Iterator[list[dict[str, Sample]]]:
        """Of each (inputs, samples), in their order."""
        reading: Future[list[dict[str, Sample]]] | None = None
        with ThreadPoolExecutor(1) as reader:
            for inputs, samples in batches:
                key = samples, *(array.shape for array in inputs)
                if key not in self._forwards:
                    self._forwards[key] = ReducingForward(self.model, samples)
                before, reading = reading, reader.submit(self._forwards[key].start(inputs))
                if before is not None:
                    yield before.result()
            if reading is not None:
                yield reading.result()


class ReducingForward:
    """A forward whose result is what is kept of each distinct linear's input."""

    def __init__(self, model: MMDiT, samples: int) -> None:
        self.model, self.samples = model, samples
        self._shapes: Shapes = {}
        self._run = mx.compile(self.reduced) if compiling_is_faster() else self.reduced

    def start(self, inputs: Inputs) -> Callable[[], list[dict[str, Sample]]]:
        """Begins to compute, and gives what waits for it and reads it."""
        flat = self._run(*inputs)
        mx.async_eval(flat)
        return partial(samples_of, flat, self._shapes, self.samples)

    def reduced(self, *inputs: mx.array) -> tuple[mx.array, ...]:
        found: dict[str, Reduced] = {}
        linears = block_linears(self.model)
        distinct = {path: linears[path] for path in map(input_of, linears)}
        with replaced(self.model, self.taps(distinct, found)):
            self.model(*inputs)
        self._shapes |= {path: tuple(a.shape for a in arrays) for path, arrays in found.items()}
        return packed(found)

    def taps(self, linears: dict[str, nn.Module], found: dict[str, Reduced]) -> dict[str, Tap]:
        before: list[mx.array] = []

        def tap(path: str, linear: nn.Module) -> Tap:
            def observe(x: mx.array) -> mx.array:
                # The forward goes on beside the reductions, but only as far as the next ones: else
                # all activations would be kept until then.
                waited = mx.depends(x, before) if before else x
                with mx.stream(lanes()[-1]):
                    found[path] = reduction(self.samples, is_post_gelu(path))(x)
                before[:] = found[path]
                return waited

            return Tap(linear, observe)

        return {path: tap(path, linear) for path, linear in linears.items()}


def check_finite(sample: dict[str, Sample], where: str) -> None:
    """Raises for NaN or infinity, naming the first layer that has it."""
    for path, statistics in sample.items():
        for name in ("minimum", "maximum", "mean", "square"):
            if not np.isfinite(statistics[name]).all():
                channel = int(np.flatnonzero(~np.isfinite(statistics[name]))[0])
                raise UserError(
                    f"the input of {path} is not finite at {where}, channel {channel}; check the "
                    "checkpoint, or compute in a wider type"
                )


def fold(samples: Iterable[Sample]) -> Sample:
    """One step's statistics of one input over the images, given in their order."""
    samples = list(samples)

    def mean(name: str) -> np.ndarray:
        return np.mean([s[name] for s in samples], axis=0, dtype=np.float64).astype(np.float32)

    folded = {
        "minimum": np.min([s["minimum"] for s in samples], axis=0),
        "maximum": np.max([s["maximum"] for s in samples], axis=0),
        "avg_min": mean("minimum"),
        "avg_max": mean("maximum"),
        "mean": mean("mean"),
        "square": mean("square"),
        "hist": np.sum([s["hist"] for s in samples], axis=0, dtype=np.int64),
    }
    if CENTRED in samples[0]:
        folded["shift"] = moving_shift(samples)
        folded[CENTRED] = np.sum([s[CENTRED] for s in samples], axis=0, dtype=np.int64)
    return folded


def moving_shift(samples: Sequence[Sample]) -> np.ndarray:
    """The moving centre of the ranges, begun with the first sample's own."""
    shift: np.ndarray | None = None
    for sample in samples:
        centre = 0.5 * (sample["minimum"].astype(np.float64) + sample["maximum"])
        if shift is None:
            shift = centre
        else:
            shift = SHIFT_MOMENTUM * shift + (1 - SHIFT_MOMENTUM) * centre
    return shift.astype(np.float32)


def flat(statistics: dict[str, Sample]) -> dict[str, np.ndarray]:
    """Names as in a file: `{path}__{name}`."""
    return {f"{path}__{n}": a for path, sample in statistics.items() for n, a in sample.items()}


def load_flat(path: Path, expect: Expected | None = None, hint: str = "") -> dict[str, Sample]:
    """The statistics in a file, by input; only finite ones."""
    loaded: dict[str, Sample] = {}
    for name, array in load_npz(path, expect, finite=True, hint=hint).items():
        layer, _, statistic = name.rpartition("__")
        loaded.setdefault(layer, {})[statistic] = array
    return loaded
