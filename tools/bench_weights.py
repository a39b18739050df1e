"""The weight track's ladder on nano: what every rung gives the whole model, and its seconds.

    python -m tools.bench_weights --captions 64 --grids 0
    python -m tools.bench_weights --captions 64 --grids 1,2,3 --rungs rtn,gptq,adaround,default \
        --name weights_grids

Each rung rounds all blocks from the same cache; then the rounded model is asked for its guided
velocity along the 16-bit model's own trajectories of captions that calibration never saw
(teacher-forced), with activations as they are and at static A8. Intervals are 95% bootstrap over
captions, of the paired gain over RTN and over GPTQ. Writes docs/benchmarks/NAME.json and NAME.md.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from src.adaround_optimize import adaround_optimize
from src.analyze_activations import analyze_activations
from src.cache_adaround_data import cache_adaround_data
from src.collect_layer_activations import collect_layer_activations
from src.generate_calibration_data import generate_calibration_data
from src.metrics.fidelity import (
    Reference,
    bootstrap_interval,
    reference_trajectories,
    teacher_forced_sqnr,
)
from src.models.load import load_pipeline
from src.models.paths import BLOCKS
from src.models.prompts import load_prompts
from src.quant.artifacts import QuantConfig, load_rounded_block
from src.quant.inject import inject
from src.weight_track.apply import rounded_weights

import click
import numpy as np

from tools.bench_common import machine, write_report

# Title, what differs from W4 per channel.
GRIDS = {
    "W4 per channel": {},
    "W4, groups of 64": {"group_size": 64},
    "W3 per channel": {"bits_w": 3},
    "W2 per channel": {"bits_w": 2},
}
BARE = {"refine": 0, "bias_correction": False, "activations_from": 1.0}
RUNGS: dict[str, dict[str, Any]] = {
    **{method: {**BARE, "method": method} for method in ("rtn", "grid", "gptq", "adaround", "ste")},
    "adaround + refine": {**BARE, "refine": None},
    "adaround + bias correction": {**BARE, "bias_correction": True},
    "adaround + QDrop": {**BARE, "activations_from": 0.75},
    "default": {},
}


@click.command()
@click.option("--model", default="nano", show_default=True)
@click.option("--captions", default=64, show_default=True, help="Of the evaluation list.")
@click.option("--eval-stride", default=3, show_default=True, help="Every how many steps.")
@click.option("--num-images", default=64, show_default=True, help="Calibration images.")
@click.option("--stride", default=3, show_default=True, help="Cached steps of each.")
@click.option("--iters", default=1000, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--rungs", default=",".join(RUNGS), show_default=True)
@click.option("--grids", default="0", show_default=True, help="Numbers of grids: 0,1,2,3.")
@click.option("--name", default="weights", show_default=True, help="Of the report.")
@click.option("--work", help="Folder for calibration and weights.  [default: a temporary one]")
def main(model: str, name: str, work: str | None, **options: Any) -> None:
    """Measure the ladder of rounding methods."""
    pipeline = load_pipeline(model)
    texts = load_prompts(f"{pipeline.prompts}_evaluation")[: options["captions"]]
    steps = pipeline.defaults.num_steps
    reference = reference_trajectories(
        pipeline, texts, num_steps=steps, stride=options["eval_stride"]
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(work or temporary)
        cache, config = calibrated(folder, model, options)
        results = {}
        for place in options["grids"].split(","):
            title = list(GRIDS)[int(place)]
            results[title] = ladder(cache, config, model, reference, GRIDS[title], options)
    data = {"machine": machine(), "results": results}
    write_report(name, f"The ladder of rounding on {model}", data, report(results))


def calibrated(work: Path, model: str, options: dict[str, Any]) -> tuple[Path, Path]:
    """The block cache, and the activation track's choice without smoothing."""
    images = options["num_images"]
    folder = generate_calibration_data(model, work / "c", num_images=images)
    cache = cache_adaround_data(folder, num_images=images, stride=options["stride"])
    collect_layer_activations(folder, num_images=min(images, 16))
    return cache, analyze_activations(folder / "activations", work / "a", tiers=(8,), smooth="none")


def ladder(
    cache: Path,
    config: Path,
    model: str,
    reference: Reference,
    grid: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """By rung: mean dB without and with A8, what it gains over others, seconds."""
    rows: dict[str, dict[str, Any]] = {}
    per_caption: dict[str, np.ndarray] = {}
    for rung in options["rungs"].split(","):
        settings = {"iters": options["iters"], "batch_size": options["batch_size"], **grid}
        place = "-".join([rung.replace(" ", ""), *(f"{k}{v}" for k, v in grid.items())])
        start = time.perf_counter()
        folder = adaround_optimize(cache, cache.parent / place, **settings, **RUNGS[rung])
        seconds = time.perf_counter() - start
        pipeline = load_pipeline(model)
        with rounded_weights(pipeline.transformer, folder):
            table = teacher_forced_sqnr(pipeline.transformer, reference)
        per_caption[rung] = table.mean(axis=0)
        quantized = with_activations(pipeline, folder, config, settings.get("bits_w", 4))
        rows[rung] = {
            "db": float(table.mean()),
            "db_a8": float(teacher_forced_sqnr(quantized, reference).mean()),
            "gains": gains(per_caption, rung),
            "per_step_db": [float(x) for x in table.mean(axis=1)],
            "seconds": seconds,
        }
        click.echo(f"{rung}: {rows[rung]['db']:.2f} dB, {seconds:.0f} s")
    return rows


def with_activations(pipeline: Any, folder: Path, config: Path, bits: int) -> Any:
    """The pipeline's transformer with these weights, and static A8 activations."""
    layers = {}
    for index in range(len(pipeline.transformer[BLOCKS])):
        layers |= load_rounded_block(folder, index)
    inject(pipeline.transformer, layers, bits=bits, config=QuantConfig.load(config))
    return pipeline.transformer


def gains(per_caption: dict[str, np.ndarray], rung: str) -> dict[str, list[float]]:
    """Over RTN and over GPTQ, where they were measured: mean, and interval over captions."""
    found = {}
    for other in ("rtn", "gptq"):
        if other in per_caption:
            paired = per_caption[rung] - per_caption[other]
            found[other] = [float(paired.mean()), *bootstrap_interval(paired)]
    return found


def report(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    lines = [
        "Teacher-forced SQNR of the guided velocity in dB: weights rounded and activations left "
        "alone, and beside it the same weights with static A8; 95% bootstrap intervals of the "
        "gains of the former, over captions.",
        "",
    ]
    for title, rows in results.items():
        lines += [f"## {title}", "", "| rung | dB | over RTN | over GPTQ | with A8 | s |"]
        lines.append("|---|---|---|---|---|---|")
        for rung, row in rows.items():
            cells = [told(row["gains"].get(other)) for other in ("rtn", "gptq")]
            lines.append(
                f"| {rung} | {row['db']:.2f} | {cells[0]} | {cells[1]} | {row['db_a8']:.2f} "
                f"| {row['seconds']:.0f} |"
            )
        lines.append("")
    return lines[:-1]


def told(gain: list[float] | None) -> str:
    if gain is None or gain == [0, 0, 0]:
        return ""
    return f"{gain[0]:+.2f} ({gain[1]:+.2f} to {gain[2]:+.2f})"


if __name__ == "__main__":
    main()
