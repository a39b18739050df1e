"""The weight track's ladder on nano: what every rung gives the whole model, and its seconds.

    python -m tools.bench_weights --captions 64 --iters 1000

Each rung rounds all blocks from the same cache; then the rounded model is asked for its guided
velocity along the 16-bit model's own trajectories of captions that calibration never saw
(teacher-forced). Intervals are 95% bootstrap over captions, of the paired gain over RTN. Writes
docs/benchmarks/weights.json and weights.md.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from src.adaround_optimize import adaround_optimize
from src.cache_adaround_data import cache_adaround_data
from src.generate_calibration_data import generate_calibration_data
from src.metrics.fidelity import bootstrap_interval, reference_trajectories, teacher_forced_sqnr
from src.models.load import load_pipeline
from src.models.prompts import load_prompts
from src.quant.block_rounding import METHODS
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


@click.command()
@click.option("--model", default="nano", show_default=True)
@click.option("--captions", default=64, show_default=True, help="Of the evaluation list.")
@click.option("--eval-stride", default=5, show_default=True, help="Every how many steps.")
@click.option("--num-images", default=64, show_default=True, help="Calibration images.")
@click.option("--stride", default=6, show_default=True, help="Cached steps of each.")
@click.option("--iters", default=1000, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--grids", default="0", show_default=True, help="Numbers of grids: 0,1,2,3.")
@click.option("--work", help="Folder for calibration and weights.  [default: a temporary one]")
def main(model: str, captions: int, eval_stride: int, work: str | None, **options: object) -> None:
    """Measure the ladder of rounding methods."""
    pipeline = load_pipeline(model)
    texts = load_prompts(f"{pipeline.prompts}_evaluation")[:captions]
    steps = pipeline.defaults.num_steps
    reference = reference_trajectories(pipeline, texts, num_steps=steps, stride=eval_stride)
    with tempfile.TemporaryDirectory() as temporary:
        cache = make_cache(Path(work or temporary), model, options)
        results = {}
        for place in str(options["grids"]).split(","):
            title = list(GRIDS)[int(place)]
            results[title] = ladder(cache, pipeline, reference, GRIDS[title], options)
    data = {"machine": machine(), "results": results}
    write_report("weights", "The ladder of rounding on " + model, data, report(results))


def make_cache(work: Path, model: str, options: dict) -> Path:
    calibration = generate_calibration_data(model, work / "c", num_images=options["num_images"])
    return cache_adaround_data(
        calibration, num_images=options["num_images"], stride=options["stride"]
    )


def ladder(cache: Path, pipeline, reference, grid: dict, options: dict) -> dict[str, dict]:
    """By method: mean dB, gain over RTN with its interval, seconds."""
    rows: dict[str, dict] = {}
    first = None
    for method in str(options["methods"]).split(","):
        start = time.perf_counter()
        folder = adaround_optimize(
            cache,
            cache.parent / f"{method}-{'-'.join(f'{k}{v}' for k, v in grid.items())}",
            method=method,
            iters=options["iters"],
            batch_size=options["batch_size"],
            **grid,
        )
        seconds = time.perf_counter() - start
        with rounded_weights(pipeline.transformer, folder):
            table = teacher_forced_sqnr(pipeline.transformer, reference)
        per_caption = table.mean(axis=0)
        first = per_caption if first is None else first
        rows[method] = {
            "db": float(table.mean()),
            "gain_db": float((per_caption - first).mean()),
            "interval_db": bootstrap_interval(per_caption - first),
            "per_step_db": [float(x) for x in table.mean(axis=1)],
            "seconds": seconds,
        }
        click.echo(f"{method}: {np.round(table.mean(), 2)} dB, {seconds:.0f} s")
    return rows


def report(results: dict[str, dict[str, dict]]) -> list[str]:
    lines = [
        "Teacher-forced SQNR of the guided velocity in dB, weights rounded and activations not; "
        "95% bootstrap interval of the gain over RTN, over captions.",
        "",
    ]
    for title, rows in results.items():
        lines += [f"## {title}", "", "| rung | dB | gain over RTN | s |", "|---|---|---|---|"]
        for method, row in rows.items():
            low, high = row["interval_db"]
            lines.append(
                f"| {method} | {row['db']:.2f} | {row['gain_db']:+.2f} ({low:+.2f} to {high:+.2f}) "
                f"| {row['seconds']:.0f} |"
            )
        lines.append("")
    return lines[:-1]


if __name__ == "__main__":
    main()
