"""Modulation put around a model's layers: chosen, measured, and applied; the choice on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..models.hooks import NoiseLevel
from ..models.pipeline import Pipeline
from ..quant.modulated import Modulated
from ..quant.residual_scales import STATIC
from ..quant.schedule import Schedule, Step
from ..sampling import StepCallback
from ..store import read_json, require_match, write_json
from ..store.files import damaged
from .residual_measures import Say, gains_of, measured_scales
from .residuals import (
    Choice,
    Levels,
    Options,
    Work,
    choose,
    held_bytes,
    largest_work,
    layers_of,
    quantizers_of,
    refuse,
    wrap,
)

FORMAT, VERSION = "ditq-residual-scales", 1
HINT = "remove it, or draw into another folder"


@dataclass(frozen=True)
class Prepared:
    """All that is decided before the first picture."""

    options: Options
    work: Work
    choice: Choice
    scales: Mapping[str, list[float]] | None  # by path, one a step; none: dynamic ones
    sigmas: Sequence[float]  # of the steps, without the final 0

    def save(self, path: Path, made_from: Mapping[str, Any]) -> Path:
        """As JSON."""
        data = {
            "layers": self.choice.layers,
            "bytes": dict(self.choice.nbytes),
            "gains": dict(self.choice.gains),
            "scales": None if self.scales is None else dict(self.scales),
            "sigmas": list(self.sigmas),
        }
        head = {"format": FORMAT, "version": VERSION, "made_from": dict(made_from)}
        write_json(path, head | data)
        return path


def load_prepared(
    path: Path, options: Options, work: Work, made_from: Mapping[str, Any]
) -> Prepared:
    """What `save` wrote for this model; that options and work are the same is for the caller."""
    data = read_json(path, FORMAT, VERSION, HINT)
    require_match(path, data.get("made_from"), dict(made_from), HINT)
    try:
        choice = Choice(data["layers"], data["bytes"], data["gains"])
        prepared = Prepared(options, work, choice, data["scales"], data["sigmas"])
        values = [v for found in (prepared.scales or {}).values() for v in found]
        sound = set(choice.layers) <= set(choice.nbytes) and all(
            math.isfinite(value) and value > 0 for value in values
        )
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise damaged(path, "it does not say what was measured")
    return prepared


def prepare(
    pipeline: Pipeline,
    options: Options,
    work: Work,
    level: NoiseLevel | None,
    say: Say,
    callbacks: Sequence[StepCallback] = (),
) -> Prepared:
    """Chooses the layers, says what they keep, and measures their scales where they are static.
    What memory has no room for beside the model is refused first.

    `level` is what the transformer follows. Its layers are in their places again afterwards, but
    their kernels may be prepared for other inputs than before: `apply` prepares them anew.
    """
    refuse(pipeline, options, work, held_bytes(pipeline.transformer))
    largest = largest_work(options, work)
    choice = choose(
        pipeline, options, largest, lambda: gains_of(pipeline, options, work, level, say)
    )
    if options.modulate is not None:
        say(choice.described(largest.batch_size))
    scales = None
    if options.residual_scale == STATIC:
        say(
            f"measuring scales on {options.scale_pictures} pictures of {work.num_steps} steps, "
            "drawn once"
        )
        scales = measured_scales(pipeline, options, work, choice.layers, level, callbacks)
    sigmas = pipeline.sigmas(work.num_steps)[:-1].tolist()
    return Prepared(options, work, choice, scales, sigmas)


def apply(
    pipeline: Pipeline,
    prepared: Prepared,
    level: NoiseLevel | None,
    exact: Mapping[str, nn.Module] | None = None,
) -> dict[str, Modulated]:
    """Wraps the transformer's layers, by path; `exact` are their 16-bit originals."""
    model, own = pipeline.transformer, None
    if prepared.scales is not None:
        own = Step(Schedule(tuple(prepared.sigmas)))
    layers = layers_of(model)
    quantizers = quantizers_of(
        prepared.options, layers, prepared.choice.layers, prepared.scales, own
    )
    wrappers = wrap(model, quantizers, exact)
    if own is not None:
        model.memory.only_at(list(prepared.sigmas))
    levels = [each for each in (level, own) if each is not None]
    model.follow(Levels(levels) if levels else None)
    return wrappers
