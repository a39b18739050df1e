"""What a comparison has found, as lines to print and as a report to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import __version__
from ..metrics.fidelity import bootstrap_interval
from ..quant.artifacts import OUTPUT_FORMAT, OUTPUT_VERSION, QuantConfig
from ..quant.loading import HINT
from ..report.content import BlockErrors, PicturePair, Report, Rung, TierMap
from ..store import human_bytes, read_json, short_hash
from .compare import Compared, Measured, Request
from .open import Quantized, distinct_inputs

COLUMNS = ("median", "worst", "mean", "95 % interval of the mean")
FIGURES = {"PSNR": "psnr", "SSIM": "ssim", "latent SQNR": "latent"}
ROW = 10  # steps or blocks on a printed line
HELD = {
    "static": "a table over the steps",
    "tensor": "each picture's largest value",
    "token": "each token's largest value",
    "channel": "each channel's largest value in a picture",
}


def figure(name: str, value: float) -> str:
    return f"{value:.3f}" if name == "SSIM" else f"{value:.1f} dB"


def figures_of(compared: Compared) -> dict[str, str]:
    """One prompt's figures, to be read."""
    return {name: figure(name, getattr(compared, field)) for name, field in FIGURES.items()}


def summary_of(compared: Sequence[Compared]) -> dict[str, list[str]]:
    """Every figure over all prompts, in the order of COLUMNS."""
    table = {}
    for name, field in FIGURES.items():
        values = np.array([getattr(one, field) for one in compared])
        shown = [figure(name, v) for v in (np.median(values), values.min(), values.mean())]
        # Equal pictures have no finite decibels, and then no interval.
        interval = bootstrap_interval(values) if np.all(np.isfinite(values)) else None
        ends = "none" if interval is None else " to ".join(figure(name, v) for v in interval)
        table[name] = [*shown, ends]
    return table


def picture_lines(compared: Sequence[Compared]) -> list[str]:
    """A line for every prompt, and for several a table over all of them."""
    lines = []
    for one in compared:
        shown = ", ".join(f"{name} {value}" for name, value in figures_of(one).items())
        lines.append(f"{shown}  (seed {one.seed}: {one.prompt})")
    if len(compared) < 2:
        return lines
    table = [["", *COLUMNS], *([name, *row] for name, row in summary_of(compared).items())]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    return lines


def measured_lines(compared: Sequence[Compared], measured: Measured) -> list[str]:
    """Where the error arises, and what both models cost."""
    kept = sum(1 for one in compared if one.latents)
    of = "" if kept == 1 else f", median of {kept} prompts"
    traced = ", ".join(f"{sigma:.3f}" for sigma in measured.traced)
    lines = [f"latent SQNR after every step, each model on its own way{of}, dB:"]
    lines += numbered(latents_by_step(compared))
    lines.append("velocity SQNR at every step, on the 16-bit model's latents, dB:")
    lines += numbered(measured.velocities)
    lines.append(
        f"SQNR of what leaves every block, mean over sigma {traced} of the 16-bit model's way, dB:"
    )
    for stream, values in measured.blocks.items():
        lines += [f"  {stream}", *numbered(values, start=0)]
    for model, held in measured.memory.items():
        disk, resident = human_bytes(held.disk), human_bytes(held.resident)
        lines.append(f"{model}: weights {disk} on disk, {resident} resident")
    steps = ", ".join(f"{model} {seconds:.3f} s" for model, seconds in measured.seconds.items())
    return [*lines, f"a step: {steps} ({slowdown(measured):.2f} times)"]


def latents_by_step(compared: Sequence[Compared]) -> list[float]:
    return np.median([one.latents for one in compared if one.latents], axis=0).tolist()


def numbered(values: Sequence[float], start: int = 1) -> list[str]:
    """Numbers in rows, each row with the number of its first."""
    return [
        f"  {start + at:4d}: " + " ".join(f"{value:5.1f}" for value in values[at : at + ROW])
        for at in range(0, len(values), ROW)
    ]


def comparison_report(
    quantized: Quantized,
    request: Request,
    compared: Sequence[Compared],
    measured: Measured,
    ladder: Sequence[Rung],
) -> Report:
    """Everything that was found, for the page."""
    pairs = [
        PicturePair(one.prompt, one.seed, one.reference, one.quantized, figures_of(one))
        for one in compared
    ]
    return Report(
        title=f"{quantized.pipeline.name} at {quantized.name}",
        settings=settings_of(quantized, request),
        notes=quantized.notes,
        pairs=pairs,
        summary=summary_of(compared),
        summary_columns=COLUMNS,
        ladder=ladder,
        tiers=tier_map(quantized),
        blocks=block_errors(quantized.sources.adaround_output),
        block_db=measured.blocks,
        step_db={
            "latent after the step": latents_by_step(compared),
            "velocity on the 16-bit latents": measured.velocities,
        },
        sigmas=measured.sigmas,
        costs=costs_of(measured),
        highlights=highlights(compared, measured),
    )


def highlights(compared: Sequence[Compared], measured: Measured) -> dict[str, str]:
    """The few figures that matter most."""
    exact, own = measured.memory.values()
    psnr = float(np.median([one.psnr for one in compared]))
    return {
        "weights on disk": f"{human_bytes(own.disk)} of {human_bytes(exact.disk)}",
        "velocity, signal to error": figure("velocity", float(np.mean(measured.velocities))),
        "median PSNR of the pictures": figure("PSNR", psnr),
        "time of a step": f"{slowdown(measured):.2f} × 16-bit",
    }


def slowdown(measured: Measured) -> float:
    """Seconds of the quantized model's step over those of the 16-bit model's."""
    exact, own = measured.seconds.values()
    return own / exact


def settings_of(quantized: Quantized, request: Request) -> dict[str, str]:
    """What was run, in reading order."""
    pipeline = quantized.pipeline
    hashes = quantized.sources.hashes
    return {
        "model": f"{pipeline.name} ({short_hash(hashes['model_hash'])})",
        **quantized.sources.described(),
        "runs as": quantized.name,
        "activation scales": scales_of(quantized),
        "kernel": ", ".join(kernels(quantized)),
        "rounded with": quantized.method,
        "16-bit model in": str(pipeline.dtype).removeprefix("mlx.core."),
        "steps": str(request.num_steps),
        "guidance": f"{request.cfg_weight:g}",
        "seeds": ", ".join(map(str, request.seeds)),
        "device": str(mx.default_device().type).removeprefix("DeviceType.").upper(),
        "versions": f"ditq {__version__}, mlx {mx.__version__}",
    }


def scales_of(quantized: Quantized) -> str:
    """Where those of the activations come from."""
    if quantized.inputs is not None:
        return HELD[quantized.inputs.options.residual_scale]
    return "none" if quantized.weights_only else HELD[quantized.settings.a_scale]


def kernels(quantized: Quantized) -> list[str]:
    """Names of the backends in use."""
    with quantized.without_wrappers() as pipeline:
        layers = dict(pipeline.transformer.named_modules())
        return sorted({layers[path].kernel for path in quantized.paths})


def tier_map(quantized: Quantized) -> TierMap | None:
    """The bits of every distinct input, where activations are quantized."""
    config: QuantConfig | None = quantized.config
    if config is None or quantized.weights_only:
        return None
    layers = distinct_inputs(config)
    bits = np.array([layer.bits for layer in layers.values()])
    return TierMap(list(layers), config.sigmas, bits)


def block_errors(adaround_output: Path) -> BlockErrors | None:
    """Every rung's output error by block, as the weight track has noted it."""
    path = adaround_output / "config.json"
    if not path.is_file():
        return None
    blocks = read_json(path, OUTPUT_FORMAT, OUTPUT_VERSION, HINT)["blocks"]
    tables: list[Mapping[str, Any]] = [
        blocks[index]["error_db"] for index in sorted(blocks, key=int)
    ]
    rungs = [name for name in tables[0] if all(name in table for table in tables)]
    return BlockErrors({name: [table[name] for table in tables] for name in rungs})


def costs_of(measured: Measured) -> dict[str, dict[str, str]]:
    """Figure to model to value."""
    models = measured.memory
    return {
        "weights on disk": {name: human_bytes(models[name].disk) for name in models},
        "weights resident": {name: human_bytes(models[name].resident) for name in models},
        "a step": {name: f"{seconds:.3f} s" for name, seconds in measured.seconds.items()},
    }
