"""A text-to-image model as a whole: text encoder, transformer and codec, with its defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..sampling import Callback, Noise, denoise, guided, sd3_sigmas, uses_guidance
from .mmdit import MMDiT


class Codec(Protocol):
    side: int  # pixels of a picture to one of the latent

    def decode(self, latent: mx.array) -> mx.array:
        """Latents to pictures (batch, height, width, 3), about 0…1."""


@dataclass(frozen=True)
class Defaults:
    """How a model is sampled unless the user says otherwise. Sizes in pixels."""

    num_steps: int
    cfg_weight: float
    shift: float
    height: int
    width: int
    calibration_images: int


@dataclass(frozen=True)
class Conditioning:
    """What the transformer hears of the text: rows of the prompts, then of the negatives."""

    text: mx.array
    pooled: mx.array


class TextEncoder(Protocol):
    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """One row a prompt, in the transformer's dtype."""

    def check(self, prompts: Sequence[str]) -> None:
        """Raises for a prompt that it cannot read, without encoding it."""


@dataclass
class Pipeline:
    """Everything between a prompt and its picture."""

    name: str
    hash: str  # of the weights as they are stored, the same on every machine
    prompts: str  # the shipped list that suits it
    encode_text: TextEncoder
    transformer: MMDiT
    codec: Codec
    defaults: Defaults
    dtype: mx.Dtype

    def condition(
        self, prompts: Sequence[str], cfg_weight: float, negative: str = ""
    ) -> Conditioning:
        """The prompts' conditioning, doubled by the negative's where guidance needs it."""
        if not prompts:
            raise UserError("no prompt given; at least one is needed")
        rows = list(prompts)
        if uses_guidance(cfg_weight):
            rows += [negative] * len(prompts)
        return self.encode_text(rows)

    def velocity(
        self, conditioning: Conditioning, cfg_weight: float
    ) -> Callable[[mx.array, mx.array], mx.array]:
        """The guided velocity of (latent, sigma) under one conditioning."""

        def guided_velocity(latent: mx.array, sigma: mx.array) -> mx.array:
            text, pooled = conditioning.text, conditioning.pooled
            return guided(self.transformer, latent, sigma, text, pooled, cfg_weight)

        # Compiling on the CPU starts a C++ compiler for little gain.
        if mx.default_device() == mx.Device(mx.cpu):
            return guided_velocity
        return mx.compile(guided_velocity, inputs=self.transformer.state)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(height, width, channels) of the latent for a picture's size in pixels."""
        config, side = self.transformer.config, self.codec.side
        step, limit = side * config.patch, side * config.patch * config.position_size
        for name, pixels in (("height", height), ("width", width)):
            if pixels % step or not step <= pixels <= limit:
                raise UserError(
                    f"{name} {pixels} is not possible with {self.name}; "
                    f"valid: multiples of {step} from {step} to {limit}"
                )
        return height // side, width // side, config.latent_channels

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        num_steps: int | None = None,
        cfg_weight: float | None = None,
        height: int | None = None,
        width: int | None = None,
        negative: str = "",
        sampler: str = "euler",
        eta: float = 0.0,
        callbacks: Sequence[Callback] = (),
    ) -> mx.array:
        """One latent per prompt and seed; what is not given is the model's default."""
        if len(prompts) != len(seeds):
            raise UserError(f"{len(prompts)} prompts but {len(seeds)} seeds; one each is needed")
        defaults = self.defaults
        weight = defaults.cfg_weight if cfg_weight is None else cfg_weight
        steps = defaults.num_steps if num_steps is None else num_steps
        sigmas = sd3_sigmas(steps, defaults.shift)
        shape = self.latent_shape(
            defaults.height if height is None else height,
            defaults.width if width is None else width,
        )
        noise = Noise(seeds)
        velocity = self.velocity(self.condition(prompts, weight, negative), weight)
        return denoise(
            velocity, noise, sigmas, shape, sampler=sampler, eta=eta, callbacks=callbacks
        )

    def decode(self, latent: mx.array) -> np.ndarray:
        """Pictures of 8 bits, (batch, height, width, 3)."""
        pictures = mx.clip(self.codec.decode(latent).astype(mx.float32), 0, 1)
        return np.array(mx.round(pictures * 255).astype(mx.uint8))
