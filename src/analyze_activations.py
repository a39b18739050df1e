"""Activation track, second stage: tier, scale, shift and smoothing of every layer and step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from .activation_track.plan import Bits, Plan
from .activation_track.report import comparison, draw_plots, summary_lines, temporal_analysis
from .calibration.activations import STATISTICS_NAME, ActivationStatistics
from .calibration.sensitivity import Samples, spread_pairs
from .calibration.trajectories import open_with_pipeline
from .cli import command, peak_memory_bytes
from .errors import UserError
from .quant.tiers import Thresholds, check_average, check_tiers
from .store import human_bytes, require_match, require_writable, write_json

POLICIES = ("thresholds", "error")
SMOOTHINGS = ("spikes", "all", "none")
TWO_REGIONS = ("post-gelu", "all", "none")
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
    model: str | None = None,
    samples: int = 4,
    smooth: str = "spikes",
    two_regions: str = "post-gelu",
    average_bits: float | None = None,
    min_sqnr: float | None = None,
    thresholds: Thresholds | None = None,
) -> Path:
    """Writes quant_config.json and layer_temporal_analysis.json; the path of the first."""
    for name, value, valid in (
        ("policy", policy, POLICIES),
        ("smooth", smooth, SMOOTHINGS),
        ("two-regions", two_regions, TWO_REGIONS),
    ):
        if value not in valid:
            raise UserError(f"unknown --{name} {value!r}; valid: {', '.join(valid)}")
    if segments < 1 or samples < 1:
        raise UserError(f"--segments {segments} and --samples {samples} must be at least 1")
    tiers = check_tiers(tiers)
    budget = max(6.0, tiers[0]) if average_bits is None else average_bits
    check_average(budget, tiers)
    folder = Path(stats if output is None else output)
    plan = make_plan(
        ActivationStatistics.open(stats),
        Path(stats).parent if calib_dir is None else calib_dir,
        model,
        samples,
        tiers=tiers,
        thresholds=thresholds or Thresholds(),
        segments=segments,
        two_regions=two_regions,
    )
    require_writable(folder)
    decide_smoothing(plan, smooth)
    chosen = decide_tiers(plan, budget, min_sqnr)
    made_from = {**plan.statistics.made_from, "statistics_hash": plan.statistics.hash}
    config = plan.config(chosen[policy], made_from)
    config.save(folder / CONFIG_NAME)
    write_json(folder / ANALYSIS_NAME, temporal_analysis(plan, config, policy))
    if plots is not None:
        draw_plots(plan, config, Path(plots))
    lines = summary_lines(plan, config)
    click.echo("\n".join([*lines, *comparison(plan, chosen, policy)]))
    return folder / CONFIG_NAME


def make_plan(
    statistics: ActivationStatistics,
    calib_dir: str | Path,
    model: str | None,
    samples: int,
    **settings: Any,
) -> Plan:
    """Opens the model and some stored steps, which must be those of the statistics."""
    trajectories, pipeline = open_with_pipeline(calib_dir, model)
    wanted = {
        "model": pipeline.name,
        "model_hash": pipeline.hash,
        "calibration_hash": trajectories.hash,
    }
    require_match(
        statistics.folder / STATISTICS_NAME,
        statistics.made_from,
        wanted,
        "collect the activations again, or give their own --calib-dir",
    )
    pairs = spread_pairs(trajectories.num_images, statistics.step_keys, samples)
    stored = Samples.load(trajectories, pipeline, pairs)
    return Plan(statistics, pipeline.transformer, stored, **settings)


def decide_smoothing(plan: Plan, smooth: str) -> None:
    paths = {"spikes": plan.spiked, "all": lambda: list(plan.statistics.inputs), "none": list}
    plan.search_smoothing(paths[smooth]())


def decide_tiers(plan: Plan, budget: float, min_sqnr: float | None) -> dict[str, Bits]:
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
        "error": plan.by_error(effects, budget, min_sqnr),
    }


def parse_tiers(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--tiers {text!r} is not a list of bits; valid: such as 4,6,8") from None


def threshold_options(function: Any) -> Any:
    """One option for every number of the published rule."""
    for found in reversed(fields(Thresholds)):
        name = f"--{found.name.replace('_', '-')}"
        text = f"Thresholds: {found.metadata['help']}."
        function = click.option(name, default=found.default, help=text)(function)
    return function


@command()
@click.option(
    "--stats", default="calibration_data/activations", help="Folder of the activation statistics."
)
@click.option("--output", help="Folder to write to.  [default: that of --stats]")
@click.option(
    "--policy", default="thresholds", help=f"How tiers are chosen: {' or '.join(POLICIES)}."
)
@click.option("--tiers", default="4,6,8", callback=parse_tiers, help="Bits to choose from.")
@click.option(
    "--segments", default=3, help="Scales that a layer may have over the steps of a tier."
)
@click.option("--plots", help="Folder for plots.  [default: none are drawn]")
@click.option("--calib-dir", help="Folder of stage 1.  [default: the one around --stats]")
@click.option("--model", help="Name or folder.  [default: the model that made the folder]")
@click.option(
    "--samples", default=4, help="Stored steps on which the velocity's error is measured."
)
@click.option("--smooth", default="spikes", help=f"Inputs to smooth: {', '.join(SMOOTHINGS)}.")
@click.option(
    "--two-regions",
    default="post-gelu",
    help=f"Inputs whose codes may be fine near 0 and coarse beyond: {', '.join(TWO_REGIONS)}.",
)
@click.option("--average-bits", type=float, help="Error policy: bits to spend.  [default: 6]")
@click.option("--min-sqnr", type=float, help="Error policy: dB to reach, instead.  [default: none]")
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
