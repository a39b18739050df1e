"""The activation track at SD3's full size, on a synthetic model with planted trouble.

    python -m tools.bench_sd3_activations --model sd3-medium --side 64 --tokens 154

Some channels are made wide (and their weights as narrow), some text fc2 inputs are moved far off
centre, and modulated inputs drift over the steps. Detection must find exactly the wide ones; shift
and smoothing must win back 90% of the error that all of it causes. Needs no checkpoint; meant for
a GPU. Writes docs/benchmarks/sd3_activations.json and sd3_activations.md.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import src  # noqa: F401  before mlx, for OpenBLAS
from src.activation_track.plan import Plan
from src.calibration.activations import ActivationStatistics
from src.calibration.sensitivity import Samples
from src.calibration.statistics import collect
from src.models.configs import MMDiTConfig, config_named
from src.models.load import default_dtype
from src.models.mmdit import MMDiT
from src.models.paths import BLOCKS
from src.models.synthetic import plant_offset, plant_outliers, randomize
from src.quant.tiers import Thresholds
from src.sampling import sd3_sigmas

import click
import mlx.core as mx
import numpy as np

from tools.bench_collection import cost_of
from tools.bench_common import machine, write_report

IMAGES = 2
BATCHES = (2, 8)  # images at once when the cost is measured
GUIDANCE = 4.0
OUTLIER_FACTOR = 60.0
OFFSET_BLOCKS = (14, 20, 21, 22)  # of SD3's 24, where text fc2 is centred far above 0
OFFSET_CENTRES = (72.0, 120.0, 180.0, 254.0)


def outlier_paths(config: MMDiTConfig) -> list[str]:
    """One input of each kind that can be planted, spread over the depth."""
    kinds = ("attn.q_proj", "mlp.fc1", "mlp.fc2")
    blocks = np.linspace(0, config.depth - 1, len(kinds) + 2).astype(int)[1:-1]
    return [
        f"{BLOCKS}.{block}.image_transformer_block.{kind}"
        for block, kind in zip(blocks, kinds, strict=True)
    ]


def offset_paths(config: MMDiTConfig) -> dict[str, float]:
    """Text fc2 inputs and their centres, at the depths where SD3 has them."""
    blocks = sorted({min(b * config.depth // 24, config.depth - 2) for b in OFFSET_BLOCKS})
    paths = (f"{BLOCKS}.{block}.text_transformer_block.mlp.fc2" for block in blocks)
    return dict(zip(paths, OFFSET_CENTRES, strict=False))


def synthetic(config: MMDiTConfig, outliers: bool, offsets: bool) -> MMDiT:
    """Random weights, ranges that drift over the steps, and what is planted."""
    model = MMDiT(config)
    randomize(model)
    for block in model[BLOCKS]:
        for stream in (block.image_transformer_block, block.text_transformer_block):
            linear = stream.adaLN_modulation.layers[1]
            # Twice as much of the timestep in every range as of what is constant, and scales small
            # enough that no layer norm times a scale has spikes of its own.
            linear.bias = 0.5 * linear.bias
    if outliers:
        for path in outlier_paths(config):
            plant_outliers(model, path, [3, config.hidden // 2], OUTLIER_FACTOR)
    if offsets:
        for path, centre in offset_paths(config).items():
            plant_offset(model, path, [7, 11, config.hidden], centre)
    model.set_dtype(default_dtype())
    mx.eval(model.parameters())
    return model


def rows(config: MMDiTConfig, side: int, tokens: int) -> tuple[mx.array, ...]:
    """Latents, text and pooled text of the images and their negatives."""
    rng = np.random.default_rng(0)
    shapes = [(side, side, config.latent_channels), (tokens, config.text_dim), (config.pooled_dim,)]
    drawn = (rng.standard_normal((2 * IMAGES, *shape)).astype(np.float32) for shape in shapes)
    return tuple(mx.array(x).astype(default_dtype()) for x in drawn)


def plan_of(model: MMDiT, side: int, tokens: int, steps: int) -> Plan:
    sigmas = dict(enumerate(float(s) for s in sd3_sigmas(steps)[:-1]))
    fixed = rows(model.config, side, tokens)
    found = {
        step: collect(model, (*fixed, mx.full((2 * IMAGES,), 1000 * sigma)), IMAGES)
        for step, sigma in sigmas.items()
    }
    pairs = [(0, 0), (1, steps - 1)]
    times = mx.array([1000 * sigmas[step] for _, step in pairs] * 2)
    samples = Samples.of(model, pairs, (*fixed, times), GUIDANCE)
    stats = ActivationStatistics.of(model, sigmas, found)
    return Plan(stats, model, samples, (4, 6, 8), Thresholds(), 3, "none")


def error(plan: Plan, bits: int) -> float:
    return 10 ** (-plan.measure(plan.uniform(bits)) / 10)


def without_treatment(plan: Plan) -> Plan:
    """The same with every shift taken out of the statistics: plain absmax and clip search."""
    inputs = {
        path: replace(found, shift=None, hist_centred=None)
        for path, found in plan.statistics.inputs.items()
    }
    return replace(plan, statistics=replace(plan.statistics, inputs=inputs), smoothing={})


def overhead(model: MMDiT, side: int, tokens: int, rounds: int, images: int) -> dict[str, Any]:
    """A forward with the reductions beside a plain one."""
    drawn = rows(model.config, side, tokens)
    inputs = [mx.concatenate([x] * (images // IMAGES)) for x in drawn]
    inputs.append(mx.full((2 * images,), 500.0))
    return cost_of(model, inputs, images, rounds)


@click.command()
@click.option("--model", default="sd3-medium", show_default=True, help="A transformer's shape.")
@click.option("--depth", type=int, help="Blocks, for a trial with fewer.  [default: the shape's]")
@click.option("--side", default=64, show_default=True, help="Of the latent: 64 is 512 pixels.")
@click.option("--tokens", default=154, show_default=True, help="Of text.")
@click.option("--steps", default=6, show_default=True)
@click.option("--bits", default=6, show_default=True, help="Tier at which errors are compared.")
@click.option("--rounds", default=5, show_default=True)
def main(
    model: str, depth: int | None, side: int, tokens: int, steps: int, bits: int, rounds: int
) -> None:
    """Plant wide channels and offsets, find them, and win their error back."""
    begun, config = time.perf_counter(), config_named(model)
    config = replace(config, depth=depth or config.depth)
    clean = without_treatment(plan_of(synthetic(config, False, False), side, tokens, steps))
    before, false_alarms = error(clean, bits), clean.spiked()
    costs = {n: overhead(clean.model, side, tokens, rounds, n) for n in BATCHES}
    del clean
    plan = plan_of(synthetic(config, True, True), side, tokens, steps)
    caused = error(without_treatment(plan), bits)
    found, planted = sorted(plan.spiked()), sorted(outlier_paths(config))
    plan.search_smoothing(found)
    treated = error(plan, bits)
    won = (caused - treated) / (caused - before)
    data = {
        "machine": machine(),
        "planted": planted,
        "found": found,
        "false_alarms_unplanted": false_alarms,
        "offsets": offset_paths(config),
        "error_unplanted": before,
        "error_planted": caused,
        "error_treated": treated,
        "won_back": won,
        "overhead": costs,
        "seconds": time.perf_counter() - begun,
    }
    lines = [
        f"{model}, {config.depth} blocks, random weights in {str(default_dtype())[9:]}, latents "
        f"{side}x{side}, {tokens} text tokens, {steps} steps, uniform A{bits}, weights not "
        f"quantized; {data['seconds']:.0f} s in all.",
        "",
        f"- planted: {len(planted)} inputs with channels {OUTLIER_FACTOR:g} times as wide, "
        f"{len(offset_paths(config))} fc2 inputs off centre; found: "
        f"{'exactly these' if found == planted else found}; without planting: "
        f"{false_alarms or 'none'}",
        f"- velocity error over velocity: {before:.4f} unplanted, {caused:.4f} planted, "
        f"{treated:.4f} with shift and smoothing: {won:.0%} of what was caused is won back",
        "- a forward with the reductions over a plain one: "
        + ", ".join(
            f"{cost['ratio']:.2f} with {n} images at once ({1e3 * cost['collecting_s']:.0f} ms "
            f"against {1e3 * cost['plain_s']:.0f})"
            for n, cost in costs.items()
        ),
    ]
    write_report("sd3_activations", "Planted trouble in a synthetic SD3", data, lines)
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
