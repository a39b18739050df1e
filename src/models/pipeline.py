"""A text-to-image model as a whole: text encoder, transformer and codec, with its defaults."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..sampling import Callback, Noise, combined, denoise, guided, sd3_sigmas, uses_guidance
from .mmdit import MMDiT


def compiling_is_faster() -> bool:
    """On the CPU at the batch sizes that it can bear, starting a C++ compiler costs more."""
    return mx.default_device() != mx.Device(mx.cpu)


class Codec(Protocol):
    side: int  # pixels of a picture to one of the latent

    def decode(self, latent: mx.array) -> mx.array:
        """Latents to pictures (batch, height, width, 3), about 0…1."""

    def check(self) -> None:
        """Raises where its weights could not be read, before any step."""


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

    def each(self, batches: Sequence[Sequence[str]]) -> list[Conditioning]:
        """The same of every batch, bit for bit; what is large is read once for all of them."""

    def tokens(self) -> int:
        """How many a prompt has, whatever it says."""

    def check(self, prompts: Sequence[str]) -> None:
        """Raises for a prompt that it cannot read, without encoding it."""

    def settings(self) -> dict[str, Any]:
        """What was chosen about how it reads prompts; nothing where there is no choice."""


class ModulateAhead(Protocol):
    def __call__(
        self, conditioning: Conditioning, sigmas: Sequence[float]
    ) -> Callable[[mx.array], list[mx.array]]:
        """From each of the sigmas to what the transformer's modulation layers give there."""


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
    modulate_ahead: ModulateAhead | None = None

    def condition(
        self, prompts: Sequence[str], cfg_weight: float, negative: str = ""
    ) -> Conditioning:
        """The prompts' conditioning, doubled by the negative's where guidance needs it."""
        if not prompts:
            raise UserError("no prompt given; at least one is needed")
        return self.encode_text(with_negatives(prompts, cfg_weight, negative))

    def condition_each(
        self, batches: Sequence[Sequence[str]], cfg_weight: float
    ) -> list[Conditioning]:
        """What `condition` gives of every batch; the text encoders are read once."""
        return self.encode_text.each([with_negatives(batch, cfg_weight) for batch in batches])

    def check(self, prompts: Sequence[str]) -> None:
        """Raises for what would fail only after long work: prompts that cannot be read, parts that
        are not there."""
        self.encode_text.check(prompts)
        self.codec.check()

    def velocity(
        self,
        conditioning: Conditioning,
        cfg_weight: float,
        sigmas: Sequence[float] | None = None,
        compiled: bool | None = None,
    ) -> Callable[[mx.array, mx.array], mx.array]:
        """The guided velocity of (latent, sigma) under one conditioning, of one picture or batch,
        and of weights that stay as they are while it is used.

        It is compiled unless it runs on the CPU, where that starts a C++ compiler for little gain;
        `compiled` says otherwise. Where modulation is computed ahead, it is so for `sigmas`, and
        the velocity is for these only.
        """

        def guided_velocity(
            latent: mx.array, sigma: mx.array, vectors: Sequence[mx.array] | None = None
        ) -> mx.array:
            text, pooled = conditioning.text, conditioning.pooled
            model = partial(self.transformer, vectors=vectors)
            return guided(model, latent, sigma, text, pooled, cfg_weight, combine)

        run, memory = guided_velocity, self.transformer.memory
        self.transformer.reset_cache(uses_guidance(cfg_weight))
        wanted = compiling_is_faster() if compiled is None else compiled
        whole = wanted and self.transformer.can_be_compiled
        # Where only parts can be compiled, this one too: compiled code rounds otherwise.
        combine = mx.compile(combined) if wanted and not whole else combined
        if whole:
            kept = {} if memory is None else memory.arrays
            run = mx.compile(run, inputs=kept, outputs=kept)
        ahead = self.modulate_ahead is not None and sigmas is not None
        if ahead:
            run = with_vectors(run, self.modulate_ahead(conditioning, sigmas))
        if whole:
            # Constants of what is compiled: thousands of inputs would cost a millisecond a step.
            # What is still to be computed of them would be computed anew at each.
            weights = self.transformer.arrays(vectors_are_given=ahead)
            mx.eval(conditioning.text, conditioning.pooled, weights)
        return run if memory is None else memory.watched(run)

    def sigmas(self, num_steps: int | None = None) -> np.ndarray:
        """The model's schedule, for its own number of steps if none is given; the last one is 0."""
        steps = self.defaults.num_steps if num_steps is None else num_steps
        return sd3_sigmas(steps, self.defaults.shift)

    def resize(self, height: int | None, width: int | None) -> None:
        """Pictures are of this size from now on, in pixels; None: of the size that they had."""
        height, width = height or self.defaults.height, width or self.defaults.width
        self.latent_shape(height, width)
        self.defaults = replace(self.defaults, height=height, width=width)

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
        defaults, sigmas = self.defaults, self.sigmas(num_steps)
        weight = defaults.cfg_weight if cfg_weight is None else cfg_weight
        shape = self.latent_shape(
            defaults.height if height is None else height,
            defaults.width if width is None else width,
        )
        noise = Noise(seeds)
        velocity = self.velocity(
            self.condition(prompts, weight, negative), weight, sigmas[:-1].tolist()
        )
        return denoise(
            velocity, noise, sigmas, shape, sampler=sampler, eta=eta, callbacks=callbacks
        )

    def finish(self, latent: mx.array) -> np.ndarray:
        """`decode`, for a pipeline that draws no more: its transformer leaves the memory first."""
        del self.transformer
        gc.collect()
        mx.clear_cache()
        return self.decode(latent)

    def decode(self, latent: mx.array) -> np.ndarray:
        """Pictures of 8 bits, (batch, height, width, 3)."""
        pictures = mx.clip(self.codec.decode(latent).astype(mx.float32), 0, 1)
        return np.array(mx.round(pictures * 255).astype(mx.uint8))


def with_negatives(prompts: Sequence[str], cfg_weight: float, negative: str = "") -> list[str]:
    """The prompts, and behind them, where guidance needs it, as many negative ones."""
    negatives = [negative] * len(prompts) if uses_guidance(cfg_weight) else []
    return [*prompts, *negatives]


def with_vectors(
    velocity: Callable[..., mx.array], vectors_at: Callable[[mx.array], list[mx.array]]
) -> Callable[[mx.array, mx.array], mx.array]:
    """The velocity of (latent, sigma) with the modulation that was computed ahead for it."""
    return lambda latent, sigma: velocity(latent, sigma, vectors_at(sigma))
