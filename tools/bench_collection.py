"""What collecting the activation statistics costs beside the plain forward passes.

    python -m tools.bench_collection --rounds 15

Writes docs/benchmarks/activations_collection.json and activations_collection.md. Time it on a
machine that does nothing else.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from src.calibration.replay import Inputs, strided_pairs, transformer_inputs
from src.calibration.statistics import Collector
from src.calibration.trajectories import open_with_pipeline
from src.generate_calibration_data import generate_calibration_data
from src.models.mmdit import MMDiT
from src.models.pipeline import compiling_is_faster

import click
import mlx.core as mx

from tools.bench_common import machine, write_report

FORWARDS = 4  # of one measurement


def plain(forward: Callable[..., mx.array], batches: list[Inputs]) -> None:
    """The forwards alone, one prepared while the one before computes, as collecting does it."""
    before = mx.array(0.0)
    for inputs in batches:
        velocity = forward(*inputs)
        mx.async_eval(velocity)
        mx.eval(before)
        before = velocity
    mx.eval(before)


def cost_of(model: MMDiT, inputs: Inputs, samples: int, rounds: int) -> dict[str, Any]:
    """Seconds of FORWARDS plain forwards and of as many with the reductions, in turn; medians."""
    forward = mx.compile(model) if compiling_is_faster() else model
    collector, batches, taken = Collector(model), [inputs] * FORWARDS, []
    for _ in range(rounds + 1):  # the first warms up
        start = time.perf_counter()
        plain(forward, batches)
        middle = time.perf_counter()
        for _ in collector.collected((batch, samples) for batch in batches):
            pass
        taken.append((middle - start, time.perf_counter() - middle))
    ratios = [collecting / alone for alone, collecting in taken[1:]]
    return {
        "plain_s": statistics.median(alone for alone, _ in taken[1:]) / FORWARDS,
        "collecting_s": statistics.median(collecting for _, collecting in taken[1:]) / FORWARDS,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


@click.command()
@click.option("--calib-dir", default="calibration_data", show_default=True, type=Path)
@click.option("--batch-size", default=4, show_default=True, help="Steps replayed together.")
@click.option("--rounds", default=15, show_default=True)
def main(calib_dir: Path, batch_size: int, rounds: int) -> None:
    """Time nano's forward passes with and without the reductions."""
    if not (calib_dir / "manifest.json").exists():
        generate_calibration_data("nano", calib_dir)
    trajectories, pipeline = open_with_pipeline(calib_dir)
    pairs = strided_pairs(trajectories, 1, trajectories.num_steps // batch_size)[:batch_size]
    inputs = transformer_inputs(trajectories, pairs, pipeline.dtype)
    cost = cost_of(pipeline.transformer, inputs, len(pairs), rounds)
    low, high = cost["ratio_range"]
    lines = [
        f"A forward of nano with the reductions takes {cost['ratio']:.2f} times a plain one "
        f"(from {low:.2f} to {high:.2f} over {rounds} paired rounds; {cost['collecting_s']:.3f} s "
        f"against {cost['plain_s']:.3f} s): {len(pairs)} steps with guidance. The goal is 1.35.",
    ]
    data = {"machine": machine(), "cost": cost}
    write_report("activations_collection", "The cost of collecting statistics", data, lines)
    click.echo(lines[0])


if __name__ == "__main__":
    main()
