"""What a change of single layers does to the guided velocity, at a few stored steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..models.mmdit import MMDiT
from ..models.paths import block_linears, input_of, replaced
from ..models.pipeline import Pipeline
from ..sampling import uses_guidance
from .replay import Inputs, Pair, transformer_inputs
from .statistics import Tap
from .trajectories import Trajectories

Velocity = Callable[[mx.array, mx.array, mx.array, mx.array], mx.array]


def spread_pairs(num_images: int, steps: Sequence[int], samples: int) -> list[Pair]:
    """Steps spread evenly over the schedule, each of another image.

    Images are taken from the last one down: the statistics are about the first ones, and what is
    judged on images that they know looks better than it is.
    """
    places = (np.arange(samples) + 0.5) * len(steps) / samples
    last = len(steps) - 1
    return [((-1 - i) % num_images, steps[min(int(place), last)]) for i, place in enumerate(places)]


@dataclass(frozen=True)
class Samples:
    """Stored steps with the velocity that the 16-bit model has there."""

    pairs: list[Pair]
    inputs: Inputs
    cfg_weight: float
    wanted: mx.array  # guided velocity

    @classmethod
    def load(cls, trajectories: Trajectories, pipeline: Pipeline, pairs: list[Pair]) -> Samples:
        inputs = transformer_inputs(trajectories, pairs, pipeline.dtype)
        return cls.of(pipeline.transformer, pairs, inputs, trajectories.cfg_weight)

    @classmethod
    def of(cls, model: MMDiT, pairs: list[Pair], inputs: Inputs, cfg_weight: float) -> Samples:
        """With the model's own velocity at these inputs."""
        wanted = combine(model(*inputs), cfg_weight)
        mx.eval(wanted)
        return cls(pairs, inputs, cfg_weight, wanted)

    def relative_errors(self, model: Velocity) -> np.ndarray:
        """(pairs,) squared error of the model's guided velocity over the squared velocity."""
        got = combine(model(*self.inputs), self.cfg_weight)
        axes = tuple(range(1, got.ndim))
        error = mx.square(got - self.wanted).sum(axis=axes)
        return np.array(error / mx.square(self.wanted).sum(axis=axes), dtype=np.float64)

    def leave_one_out(
        self, model: MMDiT, call: Velocity, changes: Mapping[str, Sequence[Mapping[str, nn.Module]]]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """For every name, (changes, pairs) errors with one change of its modules at a time.

        `call` runs the model, whose modules are replaced meanwhile.
        """
        for name, options in changes.items():
            rows = []
            for modules in options:
                with replaced(model, modules):
                    rows.append(self.relative_errors(call))
            yield name, np.stack(rows)


def combine(velocity: mx.array, weight: float) -> mx.array:
    """Guided velocity of rows that hold the prompts', then the negatives'; float32."""
    velocity = velocity.astype(mx.float32)
    if not uses_guidance(weight):
        return velocity
    prompt, negative = mx.split(velocity, 2)
    return negative + weight * (prompt - negative)


def sampled_rows(model: MMDiT, samples: Samples, tokens: int) -> dict[str, list[np.ndarray]]:
    """Some rows of every distinct input, evenly over tokens: per pair (rows, channels) float32."""
    found: dict[str, mx.array] = {}
    count = len(samples.pairs)

    def tap(path: str, linear: nn.Module) -> Tap:
        def observe(x: mx.array) -> mx.array:
            x_pairs = x.reshape(-1, count, x.size // (x.shape[-1] * len(x)), x.shape[-1])
            x_pairs = x_pairs.swapaxes(0, 1).flatten(1, 2)
            found[path] = x_pairs[:, :: max(1, x_pairs.shape[1] // tokens)].astype(mx.float32)
            return mx.depends(x, [found[path]])

        return Tap(linear, observe)

    linears = block_linears(model)
    distinct = {path: linears[path] for path in map(input_of, linears)}
    with replaced(model, {path: tap(path, linear) for path, linear in distinct.items()}):
        velocity = model(*samples.inputs)
    mx.eval(velocity, found)
    return {path: list(np.array(found[path])) for path in sorted(found)}
