"""One batch of pictures, drawn as the stages draw it, with a clock and an eye on memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..models.pipeline import Conditioning, Pipeline
from ..models.prompts import load_prompts
from ..sampling import Callback, Noise, Step, denoise, uses_guidance


@dataclass(frozen=True)
class Job:
    """What every row draws: one prompt, as often as the batch is large. Sizes in pixels."""

    prompt: str
    batch_size: int
    num_steps: int
    cfg_weight: float
    height: int
    width: int

    @classmethod
    def of(
        cls, pipeline: Pipeline, batch_size: int, num_steps: int | None, cfg_weight: float | None
    ) -> Job:
        """What is not given is the model's default; anything impossible is refused here."""
        defaults = pipeline.defaults
        steps = defaults.num_steps if num_steps is None else num_steps
        weight = defaults.cfg_weight if cfg_weight is None else cfg_weight
        if batch_size < 1:
            raise UserError(f"--batch-size {batch_size} is not possible; valid: 1 or more")
        uses_guidance(weight)
        pipeline.sigmas(steps)
        prompt = load_prompts(f"{pipeline.prompts}_evaluation")[0]
        return cls(prompt, batch_size, steps, weight, defaults.height, defaults.width)

    @property
    def rows(self) -> int:
        """Of the transformer's batch, guidance included."""
        return self.batch_size * (2 if uses_guidance(self.cfg_weight) else 1)

    def sigmas(self, pipeline: Pipeline) -> list[float]:
        """Of the steps, without the final 0."""
        return pipeline.sigmas(self.num_steps)[:-1].tolist()

    def conditioning(self, pipeline: Pipeline) -> Conditioning:
        """Of one picture: the prompt's row, and with guidance the negative's."""
        return pipeline.condition([self.prompt], self.cfg_weight)

    def for_batch(self, one: Conditioning) -> Conditioning:
        """The same for all pictures of the batch."""
        parts = (mx.repeat(part, self.batch_size, axis=0) for part in (one.text, one.pooled))
        return Conditioning(*parts)


@dataclass
class Clock:
    """A sampling callback: seconds of every step."""

    seconds: list[float] = field(default_factory=list)

    def before(self, latent: mx.array, sigmas: np.ndarray) -> None:
        mx.eval(latent)
        self._last = time.perf_counter()

    def step(self, step: Step) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


@dataclass(frozen=True)
class Drawn:
    """What one batch took."""

    steps: list[float]  # seconds of each
    seconds: float  # of all steps and of decoding; the text was encoded before
    bytes: int  # the most that denoising took beside what was held before it


def draw(
    pipeline: Pipeline, conditioning: Conditioning, job: Job, callbacks: Sequence[Callback] = ()
) -> Drawn:
    """The way of `Pipeline.sample`, from noise to 8 bits."""
    clock = Clock()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    latent = denoise(
        pipeline.velocity(conditioning, job.cfg_weight),
        Noise(range(job.batch_size)),
        pipeline.sigmas(job.num_steps),
        pipeline.latent_shape(job.height, job.width),
        callbacks=[clock, *callbacks],
    )
    taken = mx.get_peak_memory() - held
    pipeline.decode(latent)
    seconds = time.perf_counter() - start
    pipeline.transformer.reset_cache()
    return Drawn(clock.seconds, seconds, taken)


def one_step(pipeline: Pipeline, conditioning: Conditioning, job: Job) -> None:
    """Computes the first step and forgets it."""
    shape = (job.batch_size, *pipeline.latent_shape(job.height, job.width))
    velocity = pipeline.velocity(conditioning, job.cfg_weight)
    mx.eval(velocity(mx.zeros(shape), mx.array(job.sigmas(pipeline)[0], dtype=mx.float32)))
    pipeline.transformer.reset_cache()
