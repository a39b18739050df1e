"""Activation track, second stage: tier, scale, shift and smoothing of every layer and step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from .activation_track.options import Options, policy_options, threshold_options
from .activation_track.plan import Bits, Plan, open_plan
from .activation_track.report import comparison, draw_plots, summary_lines, temporal_analysis
from .calibration.activations import ActivationStatistics
from .cli import command, peak_memory_bytes
from .model_options import model_options
from .models.load import Model
from .quant.tiers import Thresholds
from .store import human_bytes, require_writable, write_json

CONFIG_NAME, ANALYSIS_NAME = "quant_config.json", "layer_temporal_analysis.json"


def analyze_activations(
    stats: str | Path = "calibration_data/activations",
    output: str | Path | None = None,
    *,
    policy: str = "thresholds",
    tiers: Sequence[int] = (4, 6, 8),
    segments: int = 3,
    plots: str | Path | None = None,
    calib_dir: str | Path | None = None,
    model: Model | None = None,
    samples: int = 4,
    smooth: str = "foldable",
    two_regions: str = "auto",
    average_bits: float | None = None,
    min_sqnr: float | None = None,
    thresholds: Thresholds | None = None,
) -> Path:
    """Writes quant_config.json and layer_temporal_analysis.json; the path of the first."""
    options = Options(
        policy=policy,
        tiers=tiers,
        segments=segments,
        samples=samples,
        smooth=smooth,
        two_regions=two_regions,
        average_bits=average_bits,
        min_sqnr=min_sqnr,
        thresholds=thresholds or Thresholds(),
    )
    folder = Path(stats if output is None else output)
    around = Path(stats).parent if calib_dir is None else calib_dir
    plan = open_plan(ActivationStatistics.open(stats), around, model, options)
    require_writable(folder)
    plan.search_smoothing(plan.to_smooth(options.smooth))
    chosen = decide_tiers(plan, options)
    made_from = {**plan.statistics.made_from, "statistics_hash": plan.statistics.hash}
    config = plan.config(chosen[options.policy], made_from)
    config.save(folder / CONFIG_NAME)
    write_json(folder / ANALYSIS_NAME, temporal_analysis(plan, config, options.policy))
    if plots is not None:
        draw_plots(plan, config, Path(plots))
    lines = summary_lines(plan, config)
    click.echo("\n".join([*lines, *comparison(plan, chosen, options.policy)]))
    return folder / CONFIG_NAME


def decide_tiers(plan: Plan, options: Options) -> dict[str, Bits]:
    """The tiers by both policies."""
    seconds, inputs = plan.leave_one_out_seconds(), len(plan.statistics.inputs)
    count = inputs * len(plan.tiers)
    click.echo(
        f"leave-one-out: {count} forwards of {len(plan.samples.pairs)} stored steps, "
        f"about {seconds:.0f} s"
    )
    with tqdm(total=inputs, desc="leave-one-out", unit="input") as bar:
        effects = plan.leave_one_out(bar.update)
    return {
        "thresholds": plan.by_thresholds(),
        "error": plan.by_error(effects, options.budget, options.min_sqnr),
    }


@command()
@click.option(
    "--stats", default="calibration_data/activations", help="Folder of the activation statistics."
)
@click.option("--output", help="Folder to write to.  [default: that of --stats]")
@click.option("--plots", help="Folder for plots.  [default: none are drawn]")
@click.option("--calib-dir", help="Folder of stage 1.  [default: the one around --stats]")
@model_options(help="Name or folder.  [default: the model that made the folder]")
@policy_options
@threshold_options
def main(**settings: Any) -> None:
    """Activation track: choose tier, scale, shift and smoothing for every layer and step.

    \b
    Example:
      python -m src.analyze_activations --policy error --average-bits 6 --plots plots
    """
    start = time.perf_counter()
    numbers = {found.name: settings.pop(found.name) for found in fields(Thresholds)}
    path = analyze_activations(thresholds=Thresholds(**numbers), **settings)
    seconds, peak = time.perf_counter() - start, human_bytes(peak_memory_bytes())
    click.echo(f"quantization config is {path}, {seconds:.1f} s, peak {peak}")


if __name__ == "__main__":
    main()
