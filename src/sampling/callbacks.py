"""What may be told about a sampling run: an object has one or more of these methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Step:
    """One finished step: `latent` entered it, `next_latent` left it."""

    index: int
    total: int
    sigma: float
    next_sigma: float
    latent: mx.array
    velocity: mx.array
    next_latent: mx.array


@runtime_checkable
class BeforeCallback(Protocol):
    def before(self, latent: mx.array, sigmas: np.ndarray) -> None:
        """The noise that the run starts from and its schedule."""


@runtime_checkable
class StepCallback(Protocol):
    def step(self, step: Step) -> None:
        """After each step."""


@runtime_checkable
class AfterCallback(Protocol):
    def after(self, latent: mx.array) -> None:
        """The finished latent."""


@runtime_checkable
class InterruptCallback(Protocol):
    def interrupt(self, latent: mx.array, done: int) -> None:
        """Ctrl-C: the latent after the `done` steps that were finished; then the run stops."""


Callback = BeforeCallback | StepCallback | AfterCallback | InterruptCallback
