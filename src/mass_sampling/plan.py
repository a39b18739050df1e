"""What is to be drawn by which model, and what is kept: checked before any work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..evaluation.networks import Network, network
from ..evaluation.sources import DTYPES
from ..inference.open import Settings, open_artifacts
from ..inference.residual_options import SIXTEEN
from ..inference.residuals import Options, Work, held_bytes, refuse
from ..models.load import Model, chosen, defaulted, load_pipeline
from ..models.pipeline import Pipeline
from ..models.prompts import load_prompts
from ..quant.loading import source_of
from ..quant.schedule import Step
from ..sampling import Noise, uses_guidance
from ..store import hash_json

DEFAULT_MODEL = "nano"  # where no artifacts name one
KEEPS = ("pictures", "features", "both")
PNG_SHARE = 0.7  # of a picture's bytes, that its PNG takes at most


@dataclass(frozen=True)
class Order:
    """What is asked for, named as on the command line; none: the model's own. What no model could
    give is refused here, before one is loaded."""

    timesteps: int | None = None
    num_samples: int = 64
    cfg_weight: float | None = None
    prompts: str | None = None
    seed: int = 0
    batch_size: int = 16
    keep: str = KEEPS[0]
    keep_latents: int = 0
    inception: str | Path | None = None

    def __post_init__(self) -> None:
        for name, value in (("num-samples", self.num_samples), ("batch-size", self.batch_size)):
            if value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}")
        if self.keep not in KEEPS:
            raise UserError(f"unknown --keep {self.keep!r}; valid: {', '.join(KEEPS)}")
        if self.inception is not None and self.keep == "pictures":
            raise UserError("--inception is for features; give --keep features or both")
        if self.keep_latents and self.keep == "pictures":
            raise UserError("--keep-latents is for features; give --keep features or both")
        if self.cfg_weight is not None:
            uses_guidance(self.cfg_weight)
        Noise([self.seeds[0], self.seeds[-1]])

    @property
    def seeds(self) -> list[int]:
        return [self.seed + i for i in range(self.num_samples)]


@dataclass(frozen=True)
class Subject:
    """The model that draws, as the tracks have made it; its inputs may still be in floats."""

    pipeline: Pipeline
    level: Step | None  # that its layers read
    weight_bit: int
    made_from: dict[str, str]
    notes: list[str]
    runtime: dict[str, Any]  # how the quantized layers run, as far as that decides what is drawn

    def check_sigmas(self, sigmas: np.ndarray) -> None:
        """Raises for sigmas outside the calibrated ones, where the layers' own grids count."""
        if self.level is not None and not self.runtime["weights_only"]:
            self.level.schedule.check([float(sigma) for sigma in sigmas if sigma > 0])


def open_subject(
    model: Model | Pipeline | None,
    weight_bit: int | None,
    adaround_output: str | Path,
    quant_config: Path | None,
    *,
    kernel: str | None = None,
    dtype: str | None = None,
    weights_only: bool,
) -> Subject:
    """With 16 bits the model itself; else with the rounded weights, which have to be of those bits.

    With `weights_only` inputs stay in floats, so that they can be quantized otherwise; `dtype` is
    what the 16-bit model computes in, by default the device's own.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is unknown; valid: {', '.join(DTYPES)}")
    if weight_bit not in (None, SIXTEEN) and not 2 <= weight_bit <= 8:
        raise UserError(f"--weight-bit {weight_bit} is not possible; valid: 2 to 8, or {SIXTEEN}")
    if weight_bit == SIXTEEN:
        pipeline = opened(model, None, dtype)
        return Subject(pipeline, None, SIXTEEN, {"model_hash": pipeline.hash}, [], {})
    settings = Settings(kernel, weights_only=weights_only)
    if dtype is not None:
        model = opened(model, source_of(adaround_output)["model"], dtype)
    artifacts = open_artifacts(model, adaround_output, quant_config, settings)
    bits = artifacts.rounded.bits
    if weight_bit not in (None, bits):
        raise UserError(
            f"{adaround_output} has weights of {bits} bits, not {weight_bit}; round them with "
            f"`python -m src.adaround_optimize --bits-w {weight_bit}`, or give --weight-bit 16"
        )
    quantized = artifacts.inject()
    return Subject(
        quantized.pipeline,
        quantized.step,
        bits,
        quantized.sources.hashes,
        quantized.notes,
        {"kernel": kernel, "weights_only": quantized.weights_only},
    )


def opened(model: Model | Pipeline | None, recorded: str | None, dtype: str | None) -> Pipeline:
    """A pipeline as it is, or the one of that name; `recorded` is what artifacts were made from."""
    if isinstance(model, Pipeline):
        return model
    found = defaulted(model, DEFAULT_MODEL) if recorded is None else chosen(model, recorded)
    return load_pipeline(found, None if dtype is None else DTYPES[dtype])


@dataclass(frozen=True)
class Plan:
    """What decides every byte of the folder."""

    subject: Subject
    options: Options | None  # how inputs are quantized here; none: as the tracks have it
    work: Work
    prompts: list[str]
    seeds: list[int]
    keep: str
    keep_latents: int  # of the first pictures
    eyes: Network | None

    def settings(self) -> dict[str, Any]:
        return {
            "weight_bit": self.subject.weight_bit,
            "inputs": None if self.options is None else self.options.settings(),
            "work": asdict(self.work),
            "num_samples": len(self.prompts),
            "seeds": [self.seeds[0], self.seeds[-1]],
            "prompts": hash_json(self.prompts),
            "keep": self.keep,
            "keep_latents": self.keep_latents,
            "network": None if self.eyes is None else self.eyes.identity.hash,
            "dtype": str(self.subject.pipeline.dtype).removeprefix("mlx.core."),
            **self.subject.runtime,
            **self.subject.pipeline.encode_text.settings(),
        }

    def batches(self) -> Iterator[range]:
        """Picture numbers, cut the same way whatever is done already: a batch rounds as a whole."""
        size, count = self.work.batch_size, len(self.prompts)
        return (range(i, min(i + size, count)) for i in range(0, count, size))

    def nbytes(self, pictures: int) -> int:
        """Disk that they take, about."""
        one = 0
        if self.keep != "features":
            one += int(3 * PNG_SHARE * self.work.height * self.work.width)
        if self.eyes is not None:
            identity = self.eyes.identity
            one += 4 * (identity.pooled + identity.spatial + identity.classes)
        latent = 4 * int(np.prod(self.subject.pipeline.latent_shape(*self.size)))
        return pictures * one + min(pictures, self.keep_latents) * latent

    @property
    def size(self) -> tuple[int, int]:
        return self.work.height, self.work.width


def make_plan(subject: Subject, options: Options | None, order: Order) -> Plan:
    """Takes the model's defaults for what is not given, and refuses what cannot be."""
    pipeline, defaults = subject.pipeline, subject.pipeline.defaults
    texts = load_prompts(order.prompts or f"{pipeline.prompts}_evaluation")
    steps = defaults.num_steps if order.timesteps is None else order.timesteps
    weight = defaults.cfg_weight if order.cfg_weight is None else order.cfg_weight
    subject.check_sigmas(pipeline.sigmas(steps))
    plan = Plan(
        subject,
        options,
        Work.of(pipeline, steps, weight, min(order.batch_size, order.num_samples)),
        [texts[i % len(texts)] for i in range(order.num_samples)],
        order.seeds,
        order.keep,
        order.keep_latents,
        None if order.keep == "pictures" else network(order.inception),
    )
    if options is not None:
        refuse(pipeline, options, plan.work, held_bytes(pipeline.transformer))
    pipeline.check(sorted(set(plan.prompts)))
    if plan.eyes is not None:
        plan.eyes.check(*plan.size)
    return plan
