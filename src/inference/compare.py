"""The quantized model beside the 16-bit one: pictures, latents, blocks, seconds, bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..calibration.capture import BlockTrace, captured_blocks
from ..metrics.fidelity import Reference, teacher_forced_sqnr
from ..metrics.psnr import psnr
from ..metrics.signal import sqnr_db
from ..metrics.ssim import ssim
from ..models.mmdit import MMDiT
from ..models.pipeline import Pipeline
from ..quant.modulated import Velocity
from ..sampling import Callback, Noise, Step, uses_guidance
from .export import quantized_layers, transformer_tensors
from .open import Quantized

REFERENCE = "16-bit"  # the name of the model as it was
ROUNDS = 5  # of timing both models in turn
TRACED_STEPS = 3  # at which the blocks are compared, about


@dataclass(frozen=True)
class Request:
    """What is to be drawn: prompt i with the noise of seeds[i], each by itself."""

    prompts: list[str]
    seeds: list[int]
    num_steps: int
    cfg_weight: float

    @classmethod
    def of(
        cls,
        pipeline: Pipeline,
        prompts: Sequence[str],
        seed: int,
        num_steps: int | None,
        cfg_weight: float | None,
    ) -> Request:
        """What is not given is the model's default; anything impossible is refused here."""
        defaults = pipeline.defaults
        steps = defaults.num_steps if num_steps is None else num_steps
        weight = defaults.cfg_weight if cfg_weight is None else cfg_weight
        seeds = [seed + i for i in range(len(prompts))]
        uses_guidance(weight)
        pipeline.sigmas(steps)
        Noise(seeds)
        pipeline.check(prompts)
        return cls(list(prompts), seeds, steps, weight)

    def sigmas(self, pipeline: Pipeline) -> list[float]:
        """Of the steps, without the final 0."""
        return pipeline.sigmas(self.num_steps)[:-1].tolist()


@dataclass
class Trail:
    """A sampling callback that keeps the latents, from the noise to the last, and velocities."""

    latents: list[mx.array] = field(default_factory=list)
    velocities: list[mx.array] = field(default_factory=list)

    def before(self, latent: mx.array, sigmas: np.ndarray) -> None:
        self.latents.append(latent)

    def step(self, step: Step) -> None:
        self.latents.append(step.next_latent)
        self.velocities.append(step.velocity)


@dataclass(frozen=True)
class Drawn:
    """One picture (height, width, 3), 8 bits, its latent, and the way to it where it was kept."""

    picture: np.ndarray
    latent: mx.array
    trail: Trail | None = None


def draw(
    pipeline: Pipeline, request: Request, callbacks: Sequence[Callback] = (), trails: int = 0
) -> list[Drawn]:
    """The request's pictures; of the first `trails` of them all latents are kept."""
    drawn = []
    for index, (prompt, seed) in enumerate(zip(request.prompts, request.seeds, strict=True)):
        trail = Trail() if index < trails else None
        latent = pipeline.sample(
            [prompt],
            [seed],
            num_steps=request.num_steps,
            cfg_weight=request.cfg_weight,
            callbacks=callbacks if trail is None else [*callbacks, trail],
        )
        drawn.append(Drawn(pipeline.decode(latent)[0], latent, trail))
    return drawn


@dataclass(frozen=True)
class Compared:
    """One prompt drawn by both models from the same noise."""

    prompt: str
    seed: int
    reference: np.ndarray
    quantized: np.ndarray
    psnr: float  # dB
    ssim: float
    latent: float  # dB, of the finished latent
    latents: list[float]  # dB after every step, each model on its own way; empty if not kept


def compare(
    request: Request, references: Sequence[Drawn], found: Sequence[Drawn]
) -> list[Compared]:
    """Prompt by prompt."""
    compared = []
    for prompt, seed, wanted, got in zip(
        request.prompts, request.seeds, references, found, strict=True
    ):
        steps = []
        if wanted.trail is not None and got.trail is not None:
            pairs = zip(wanted.trail.latents, got.trail.latents, strict=True)
            steps = [sqnr_db(*pair) for pair in pairs][1:]  # the noise is the same
        compared.append(
            Compared(
                prompt,
                seed,
                wanted.picture,
                got.picture,
                psnr(wanted.picture, got.picture),
                ssim(wanted.picture, got.picture),
                sqnr_db(wanted.latent, got.latent),
                steps,
            )
        )
    return compared


@dataclass(frozen=True)
class Footprint:
    """What a transformer's weights take."""

    disk: int
    resident: int


@dataclass(frozen=True)
class Measured:
    """Where in the first prompt's run the error arises, and what both models cost."""

    sigmas: list[float]  # of the steps
    velocities: list[float]  # dB of the guided velocity on the 16-bit model's latents, by step
    traced: list[float]  # sigmas at which the blocks were compared
    blocks: dict[str, list[float]]  # dB by stream, of what leaves each block
    memory: dict[str, Footprint]  # by model
    seconds: dict[str, float]  # of a step of one picture


def measure(quantized: Quantized, request: Request, reference: Trail) -> Measured:
    """Along the 16-bit model's way to the first picture. Needs the 16-bit layers at hand."""
    pipeline = quantized.pipeline
    sigmas = request.sigmas(pipeline)
    way = reference_of(pipeline, request, 0, reference)
    places = evenly(len(sigmas), TRACED_STEPS)
    return Measured(
        sigmas,
        teacher_forced_sqnr(pipeline.transformer, way)[:, 0].tolist(),
        [sigmas[place] for place in places],
        block_sqnr(quantized, way, places),
        memory_of_both(quantized),
        seconds_a_step(quantized, way),
    )


def reference_of(
    pipeline: Pipeline, request: Request, index: int, trail: Trail, steps: int | None = None
) -> Reference:
    """The 16-bit model's way to picture `index`: all its steps, or about so many, evenly."""
    sigmas = request.sigmas(pipeline)
    places = evenly(len(sigmas), steps)
    return Reference(
        pipeline.condition([request.prompts[index]], request.cfg_weight),
        request.cfg_weight,
        [sigmas[place] for place in places],
        [trail.latents[place] for place in places],
        [trail.velocities[place] for place in places],
    )


def evenly(count: int, steps: int | None) -> range:
    """All of so many steps, or about `steps` of them."""
    return range(0, count, 1 if steps is None else max(1, count // steps))


def block_sqnr(
    quantized: Quantized, way: Reference, places: Sequence[int]
) -> dict[str, list[float]]:
    """dB of what leaves each block, by stream, mean over some places of the whole way.

    Both models run as wholes on the same latent: a block's error is that of all up to it. A model
    that modulates walks all of the way, since its changes are those from step to step.
    """
    tables: dict[str, list[list[float]]] = {"image": [], "text": []}
    pipeline, weight = quantized.pipeline, way.cfg_weight
    velocity = pipeline.velocity(way.conditioning, weight, compiled=False)
    modulates = pipeline.transformer.memory is not None
    for place in range(max(places) + 1) if modulates else places:
        got = traced_blocks(pipeline, velocity, way, place)
        if place not in places:
            continue
        with quantized.sixteen_bit() as exact:
            own = exact.velocity(way.conditioning, weight, compiled=False)
            wanted = traced_blocks(exact, own, way, place)
        for stream, table in tables.items():
            pairs = zip(getattr(wanted, stream)[1:], getattr(got, stream)[1:], strict=True)
            table.append([sqnr_db(*pair) for pair in pairs])
    return {stream: np.mean(table, axis=0).tolist() for stream, table in tables.items()}


def traced_blocks(
    pipeline: Pipeline, velocity: Velocity, reference: Reference, place: int
) -> BlockTrace:
    """What passes between the blocks at one of the reference's latents."""
    level = mx.array(reference.sigmas[place], dtype=mx.float32)
    with captured_blocks(pipeline.transformer) as trace:
        mx.eval(velocity(reference.latents[place], level))
    return trace


def seconds_a_step(quantized: Quantized, reference: Reference) -> dict[str, float]:
    """Median over some rounds, in each of which both models run one after the other."""
    pipeline, latent = quantized.pipeline, reference.latents[0]
    level = mx.array(reference.sigmas[0], dtype=mx.float32)
    with quantized.sixteen_bit():
        velocities = [pipeline.velocity(reference.conditioning, reference.cfg_weight)]
    velocities.append(pipeline.velocity(reference.conditioning, reference.cfg_weight))

    def run(which: int) -> float:
        start = time.perf_counter()
        mx.eval(velocities[which](latent, level))
        return time.perf_counter() - start

    exact, rounded = [], []
    for _ in range(ROUNDS + 1):  # the first compiles, or warms up
        with quantized.sixteen_bit():
            exact.append(run(0))
        rounded.append(run(1))
    return {
        REFERENCE: statistics.median(exact[1:]),
        quantized.name: statistics.median(rounded[1:]),
    }


def memory_of_both(quantized: Quantized) -> dict[str, Footprint]:
    with quantized.without_wrappers() as pipeline:
        own = weight_bytes(pipeline.transformer)
    with quantized.sixteen_bit() as pipeline:
        return {REFERENCE: weight_bytes(pipeline.transformer), quantized.name: own}


def weight_bytes(model: MMDiT) -> Footprint:
    """On disk: as `--save` writes it, what is not quantized in 16 bits where these are enough.
    Resident: every array that the model holds, also what backends have unpacked."""
    saved = transformer_tensors(model, quantized_layers(model))
    disk = sum(tensor.nbytes for tensors in saved for tensor in tensors.values())
    arrays = [leaf for _, leaf in tree_flatten(model) if isinstance(leaf, mx.array)]
    return Footprint(disk, sum({id(array): array.nbytes for array in arrays}.values()))
