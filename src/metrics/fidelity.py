"""Fidelity to the 16-bit model along its own trajectories (teacher-forced).

Captions that calibration never saw are sampled with the 16-bit model once; the quantized model is
then asked for its guided velocity at the very same latents. SQNR in dB per caption and step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..models.mmdit import MMDiT
from ..models.pipeline import Conditioning, Pipeline
from ..sampling import Noise, Step, denoise, guided, sd3_sigmas, uses_guidance
from .signal import decibel

Velocity = Callable[[mx.array, mx.array, mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class Reference:
    """The 16-bit model's trajectories: latents that entered each step, and its velocities there."""

    conditioning: Conditioning  # prompts' rows, then the negatives'
    cfg_weight: float
    sigmas: list[float]  # of the kept steps
    latents: list[mx.array]  # per step (captions, height, width, channels)
    velocities: list[mx.array]  # guided, float32

    @property
    def captions(self) -> int:
        return len(self.latents[0])


class KeepSteps:
    """A sampling callback that keeps every stride-th step."""

    def __init__(self, stride: int) -> None:
        self.stride, self.kept = stride, []

    def step(self, step: Step) -> None:
        if step.index % self.stride == 0:
            self.kept.append(step)


def reference_trajectories(
    pipeline: Pipeline, captions: list[str], *, seed: int = 10_000, num_steps: int, stride: int = 1
) -> Reference:
    """Samples the captions with the pipeline's own model; seeds count up from `seed`."""
    defaults = pipeline.defaults
    conditioning = pipeline.condition(captions, defaults.cfg_weight)
    keep = KeepSteps(stride)
    denoise(
        pipeline.velocity(conditioning, defaults.cfg_weight),
        Noise([seed + i for i in range(len(captions))]),
        sd3_sigmas(num_steps, defaults.shift),
        pipeline.latent_shape(defaults.height, defaults.width),
        callbacks=[keep],
    )
    return Reference(
        conditioning,
        defaults.cfg_weight,
        [step.sigma for step in keep.kept],
        [step.latent for step in keep.kept],
        [step.velocity for step in keep.kept],
    )


def teacher_forced_sqnr(model: MMDiT | Velocity, reference: Reference) -> np.ndarray:
    """(steps, captions) dB of the model's guided velocity against the reference's."""
    table = []
    if isinstance(model, MMDiT):
        model.reset_cache(uses_guidance(reference.cfg_weight))
    for sigma, latent, wanted in zip(
        reference.sigmas, reference.latents, reference.velocities, strict=True
    ):
        text, pooled = reference.conditioning.text, reference.conditioning.pooled
        level = mx.array(sigma, dtype=mx.float32)
        got = guided(model, latent, level, text, pooled, reference.cfg_weight)
        axes = tuple(range(1, wanted.ndim))
        signal = np.array(mx.sum(mx.square(wanted), axis=axes))
        error = np.array(mx.sum(mx.square(wanted - got), axis=axes))
        table.append([decibel(s, e) for s, e in zip(signal, error, strict=True)])
    return np.array(table)


def bootstrap_interval(
    values: np.ndarray,
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    of: Callable[[np.ndarray], float] = np.mean,
) -> tuple[float, float]:
    """Interval of the mean, or of another figure, of one value per caption; for a difference, pass
    paired differences."""
    rng, values = np.random.default_rng(seed), np.asarray(values)
    found = [of(values[rng.integers(0, len(values), len(values))]) for _ in range(draws)]
    tail = 50 * (1 - level)
    return float(np.percentile(found, tail)), float(np.percentile(found, 100 - tail))
