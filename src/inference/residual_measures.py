"""What modulation has to know of a model before it draws: static scales, and each layer's gain."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..models.pipeline import Conditioning, Pipeline
from ..models.prompts import load_prompts
from ..quant.modulated import Modulated, set_quant_state
from ..quant.residual_scales import ANCHOR_BITS, CLIPPED_CHANGE, STATIC, Dynamic, Search
from ..sampling import Noise, StepCallback, denoise
from .residuals import Options, Work, layers_of, wrapped

SCALE_SEED = 30_000  # of the pictures that are measured on
GAIN_PICTURES = 2
GAIN_PLACES = (0.3, 0.7)  # shares of a schedule, at which a layer's gain is measured

Say = Callable[[str], None]


def measured_scales(
    pipeline: Pipeline,
    options: Options,
    work: Work,
    chosen: Sequence[str],
    level: object,
    callbacks: Sequence[StepCallback] = (),
) -> dict[str, list[float]]:
    """By path the scales at every step: of changes where a layer is chosen, else of values that are
    quantized on static ones.

    Pictures are drawn once. Each scale is searched on what comes to its layer at its step, and used
    from there on: so all of them are measured along the quantized model's own way.
    """
    model, (bits, kind) = pipeline.transformer, options.rest
    searches, quantizers = {}, {}
    for path in layers_of(model):
        if path in chosen:
            searches[path] = Search(options.act_bit, ANCHOR_BITS, CLIPPED_CHANGE)
            quantizers[path] = (searches[path], None)
        elif kind == STATIC:
            searches[path] = Search(bits, bits)
            quantizers[path] = (None, searches[path])
        else:
            quantizers[path] = (None, Dynamic(bits, kind, bits))
    with wrapped(model, quantizers, level):
        draw(pipeline, calibration(pipeline, options.scale_pictures, work), work, callbacks)
    return {path: search.found for path, search in searches.items()}


@dataclass(frozen=True)
class Captions:
    """Some to calibrate with, encoded."""

    pictures: int
    conditioning: Conditioning


def calibration(pipeline: Pipeline, pictures: int, work: Work) -> Captions:
    """The first of the model's own list, again and again."""
    texts = load_prompts(pipeline.prompts)
    chosen = [texts[i % len(texts)] for i in range(pictures)]
    return Captions(pictures, pipeline.condition(chosen, work.cfg_weight))


def draw(
    pipeline: Pipeline, captions: Captions, work: Work, callbacks: Sequence[StepCallback]
) -> mx.array:
    """Latents of the captions, step by step."""
    return denoise(
        pipeline.velocity(captions.conditioning, work.cfg_weight, compiled=False),
        Noise([SCALE_SEED + i for i in range(captions.pictures)]),
        pipeline.sigmas(work.num_steps),
        pipeline.latent_shape(work.height, work.width),
        callbacks=callbacks,
    )


@dataclass
class KeepPairs:
    """A sampling callback that keeps what entered some steps and the ones before them."""

    places: Sequence[int]

    def before(self, latent: mx.array, sigmas: np.ndarray) -> None:
        self.kept: dict[int, tuple[mx.array, float, mx.array]] = {}

    def step(self, step) -> None:
        if step.index in self.places or step.index + 1 in self.places:
            self.kept[step.index] = (step.latent, step.sigma, step.velocity)


def gains_of(
    pipeline: Pipeline, options: Options, work: Work, level: object, say: Say
) -> dict[str, float]:
    """By path how much less error the guided velocity has if that layer, the only one whose input
    is quantized, is modulated: relative squared error, mean over some steps.

    Scales are dynamic ones. The way is that of the model without quantized inputs.
    """
    bits, kind = options.rest
    changes, values = (
        "token" if each == STATIC else each for each in (options.residual_scale, kind)
    )
    quantizers = (Dynamic(options.act_bit, changes, ANCHOR_BITS), Dynamic(bits, values, bits))
    paths = list(layers_of(pipeline.transformer))
    captions = calibration(pipeline, GAIN_PICTURES, work)
    places = sorted({max(1, int(share * work.num_steps)) for share in GAIN_PLACES})
    with wrapped(pipeline.transformer, dict.fromkeys(paths, quantizers), level) as layers:
        set_quant_state(pipeline.transformer, activations=False)
        keep, started = KeepPairs([p for p in places if p < work.num_steps]), time.perf_counter()
        draw(pipeline, captions, work, [keep])
        seconds = (time.perf_counter() - started) / work.num_steps * 3 * len(keep.places)
        say(
            f"measuring what modulation gives to each of {len(paths)} layers, about "
            f"{seconds * len(paths):.0f} s"
        )
        conditioning = captions.conditioning
        return {p: gain(pipeline, conditioning, layers[p], keep, work) for p in paths}


def gain(
    pipeline: Pipeline, conditioning: Conditioning, layer: Modulated, keep: KeepPairs, work: Work
) -> float:
    """Of one layer."""
    removed = []
    for place in keep.places:
        errors = []
        for modulate in (False, True):
            layer.switch(modulate=modulate)
            velocity = pipeline.velocity(conditioning, work.cfg_weight, compiled=False)
            for step in (place - 1, place) if modulate else (place,):
                latent, sigma, wanted = keep.kept[step]
                got = velocity(latent, mx.array(sigma, dtype=mx.float32))
                mx.eval(got)
            errors.append(float(mx.square(got - wanted).sum() / mx.square(wanted).sum()))
        removed.append(errors[0] - errors[1])
    layer.switch(activations=False)
    return float(np.mean(removed))
