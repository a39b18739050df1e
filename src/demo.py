"""`ditq demo`: all six stages on nano, from nothing to the report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from .cli import command, peak_memory_bytes
from .errors import UserError
from .generate_calibration_data import generate_calibration_data
from .load_adaround_model import load_adaround_model
from .models.prompts import load_prompts
from .side_by_side import Track, run_side_by_side
from .store import human_bytes

CAPTIONS = "nano_evaluation"
WEIGHTS, ACTIVATIONS = "weights", "activations"
# Chosen for three minutes on two cores: GPTQ needs no iterations, and at 4 bits it is as good.
METHOD, CACHED_STEPS = "gptq", 10
STATISTICS_IMAGES, STATISTICS_STEPS, JUDGED_STEPS = 5, 15, 3


def demo(
    folder: str | Path = "demo",
    *,
    model: str = "nano",
    num_images: int = 12,
    num_steps: int = 30,
    prompts: int = 8,
) -> Path:
    """Runs the stages in `folder` and gives the path of the report; a second run goes on."""
    folder = Path(folder)
    captions = load_prompts(CAPTIONS)
    if not 1 <= prompts <= len(captions):
        raise UserError(f"--prompts must be from 1 to {len(captions)}, got {prompts}")
    click.echo("1 of 6: the 16-bit model's own pictures, every step of them")
    calibration = generate_calibration_data(
        model, folder / "calibration_data", num_images=num_images, num_steps=num_steps
    )
    rounded = folder / "adaround_output"
    click.echo("2 to 5 of 6: both tracks side by side")
    run_side_by_side(
        [
            weight_track(calibration, rounded, num_images, num_steps // CACHED_STEPS),
            activation_track(calibration, num_images, num_steps // STATISTICS_STEPS),
        ]
    )
    click.echo("6 of 6: pictures on 4-bit weights, beside those of the 16-bit model")
    return load_adaround_model(
        captions[:prompts],
        folder / "pictures" / "quantized.png",
        adaround_output=rounded,
        quant_config=calibration / ACTIVATIONS / "quant_config.json",
        num_steps=num_steps,
        report=folder / "report",
    ).files[-1]


def weight_track(calibration: Path, rounded: Path, num_images: int, stride: int) -> Track:
    cache = str(calibration / "adaround_cache")
    replayed = replay_options(calibration, num_images, stride)
    rounding = ["--cache-dir", cache, "--output-dir", str(rounded), "--method", METHOD]
    return Track(WEIGHTS, [["cache_adaround_data", *replayed], ["adaround_optimize", *rounding]])


def activation_track(calibration: Path, num_images: int, stride: int) -> Track:
    """Without smoothing, since the weights are rounded at the same time and cannot know of it."""
    replayed = replay_options(calibration, min(num_images, STATISTICS_IMAGES), stride)
    stats = str(calibration / ACTIVATIONS)
    choosing = ["--stats", stats, "--policy", "error", "--smooth", "none"]
    choosing += ["--samples", str(JUDGED_STEPS)]
    return Track(
        ACTIVATIONS,
        [["collect_layer_activations", *replayed], ["analyze_activations", *choosing]],
    )


def replay_options(calibration: Path, num_images: int, stride: int) -> list[str]:
    steps = ["--stride", str(max(1, stride))]
    return ["--calib-dir", str(calibration), "--num-images", str(num_images), *steps]


@command()
@click.option("--folder", default="demo", help="Where to work; a second run goes on there.")
@click.option("--model", default="nano", help="Of nano's family: nano, tiny, or a folder.")
@click.option("--num-images", default=12, help="Pictures to learn from.")
@click.option("--num-steps", default=30, help="Steps of each.")
@click.option("--prompts", default=8, help="Pictures to compare, of captions not learned from.")
def main(folder: str, **settings: Any) -> None:
    """Run all six stages on nano, from nothing to the report.

    \b
    Example:
      ditq demo
    """
    start = time.perf_counter()
    report = demo(folder, **settings)
    seconds, peak = time.perf_counter() - start, human_bytes(peak_memory_bytes())
    click.echo(f"look at {report}; made in {seconds:.1f} s, peak {peak}")


if __name__ == "__main__":
    main()
