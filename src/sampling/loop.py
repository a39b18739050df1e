"""The sampling loop and its two samplers, for rectified flow: x = (1 − σ)·clean + σ·noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import mlx.core as mx
import numpy as np

from ..errors import UserError
from .callbacks import (
    AfterCallback,
    BeforeCallback,
    Callback,
    InterruptCallback,
    Step,
    StepCallback,
)
from .noise import Noise

SAMPLERS = ("euler", "ddim")

# (latent, scalar sigma) to velocity.
Velocity = Callable[[mx.array, mx.array], mx.array]


def euler(latent: mx.array, velocity: mx.array, sigma: float, next_sigma: float) -> mx.array:
    return latent + velocity * (next_sigma - sigma)


def ddim(
    latent: mx.array,
    velocity: mx.array,
    sigma: float,
    next_sigma: float,
    eta: float,
    fresh: Callable[[], mx.array],
) -> mx.array:
    """Keeps the predicted clean latent and renews part of its noise.

    eta 1 draws from the exact posterior of the previous noise level; eta 0 renews nothing and is
    Euler's step.
    """
    clean, noise = latent - sigma * velocity, latent + (1 - sigma) * velocity
    renewed = renewed_sigma(sigma, next_sigma, eta)
    kept = math.sqrt(next_sigma**2 - renewed**2)
    stepped = (1 - next_sigma) * clean + kept * noise
    return stepped + renewed * fresh() if renewed > 0 else stepped


def renewed_sigma(sigma: float, next_sigma: float, eta: float) -> float:
    """Deviation of the noise that one DDIM step draws anew, at most all of next_sigma."""
    if eta == 0 or next_sigma == 0:
        return 0.0
    signal_ratio = (1 - sigma) / (1 - next_sigma)
    posterior = next_sigma / sigma * math.sqrt(sigma**2 - (signal_ratio * next_sigma) ** 2)
    return min(eta * posterior, next_sigma)


def denoise(
    velocity_of: Velocity,
    noise: Noise,
    sigmas: np.ndarray,
    shape: tuple[int, int, int],
    *,
    sampler: str = "euler",
    eta: float = 0.0,
    callbacks: Sequence[Callback] = (),
) -> mx.array:
    """Runs the schedule on fresh noise of (height, width, channels); the latent, float32."""
    check_sampler(sampler, eta)
    latent = noise.draw(*shape) * float(sigmas[0])
    for callback in callbacks:
        if isinstance(callback, BeforeCallback):
            callback.before(latent, sigmas)
    levels = [float(sigma) for sigma in sigmas]
    done = 0
    try:
        for sigma, next_sigma in pairwise(levels):
            velocity = velocity_of(latent, mx.array(sigma, dtype=mx.float32))
            if sampler == "euler":
                stepped = euler(latent, velocity, sigma, next_sigma)
            else:
                stepped = ddim(latent, velocity, sigma, next_sigma, eta, lambda: noise.draw(*shape))
            mx.eval(stepped)
            step = Step(done, len(levels) - 1, sigma, next_sigma, latent, velocity, stepped)
            latent, done = stepped, done + 1
            for callback in callbacks:
                if isinstance(callback, StepCallback):
                    callback.step(step)
    except KeyboardInterrupt:
        for callback in callbacks:
            if isinstance(callback, InterruptCallback):
                callback.interrupt(latent, done)
        raise
    for callback in callbacks:
        if isinstance(callback, AfterCallback):
            callback.after(latent)
    return latent


def check_sampler(sampler: str, eta: float) -> None:
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler {sampler!r}; valid: {', '.join(SAMPLERS)}")
    if not eta >= 0 or math.isinf(eta):
        raise UserError(f"eta must be a number of at least 0, got {eta}")
    if eta and sampler != "ddim":
        raise UserError(f"eta {eta} needs the ddim sampler; {sampler} takes no noise")
