"""What analyze_activations tells about its choice: tables, JSON and plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration import histogram
from ..calibration.activations import FORMAT as STATISTICS_FORMAT
from ..quant.artifacts import QuantConfig
from ..quant.plan import largest_values
from ..quant.temporal import block_of, describe, kind_of, scales_needed, tiers_by_kind
from ..report import plots
from ..report.plots import Row, Treatment
from .plan import Bits, Plan

ANALYSIS_FORMAT, ANALYSIS_VERSION = "ditq-temporal-analysis", 1
PANELS = 4  # layers that the percentile plot shows
TREATED = 3  # inputs that the plot of shift and smoothing shows


def temporal_analysis(plan: Plan, config: QuantConfig, policy: str) -> dict[str, Any]:
    """What layer_temporal_analysis.json holds."""
    layers = {}
    for path, found in plan.statistics.inputs.items():
        layer = config.layers[path]
        largest = largest_values(found.minimum, found.maximum, layer.shift, layer.smoothing)
        search = plan.smoothing.get(path)
        layers[path] = describe(largest, layer, plan.readers[path], search)
    return {
        "format": ANALYSIS_FORMAT,
        "version": ANALYSIS_VERSION,
        "made_from": {**config.made_from, "statistics_format": STATISTICS_FORMAT},
        "policy": policy,
        "step_keys": config.step_keys,
        "sigmas": config.sigmas,
        "layers": layers,
        "switchers": [path for path, layer in layers.items() if layer["switches"]],
        "always_a8": [path for path, layer in layers.items() if set(layer["bits"]) == {8}],
        "smoothed": plan.smoothed,
    }


def summary_lines(plan: Plan, config: QuantConfig) -> list[str]:
    """Tiers by kind of layer, layers smoothed, scales needed."""
    tiers = plan.tiers
    lines = ["", "share of linears and steps  " + "".join(f"{f'A{t}':>7}" for t in tiers)]
    for kind, counts in tiers_by_kind(config.layers).items():
        shares = (counts[tier] / sum(counts.values()) for tier in tiers)
        lines.append(f"  {kind:26}" + "".join(f"{share:7.0%}" for share in shares))
    scales = sum(len(scales_needed(config.layers[path])) for path in plan.statistics.inputs)
    cells = len(plan.statistics.inputs) * len(config.step_keys)
    lines.append(f"inputs smoothed: {len(plan.smoothed)} of {len(plan.smoothing)} searched")
    lines.append(f"scales needed: {scales} for {cells} pairs of input and step")
    return lines


def comparison(plan: Plan, chosen: Mapping[str, Bits], policy: str) -> list[str]:
    """The chosen config beside uniform tiers and the other policy, measured alike."""
    other = next(name for name in chosen if name != policy)
    rows = {f"{policy} (chosen)": chosen[policy], other: chosen[other]}
    rows |= {f"uniform A{bits}": plan.uniform(bits) for bits in (8, 6) if bits in plan.tiers}
    lines = ["", f"{'config':22}{'average bits':>14}{'velocity SQNR':>16}"]
    for name, bits in rows.items():
        lines.append(f"{name:22}{plan.average_bits(bits):14.2f}{plan.measure(bits):13.1f} dB")
    count = len(plan.samples.pairs)
    return [*lines, f"weights at 16 bits, {count} stored steps of the calibration"]


def draw_plots(plan: Plan, config: QuantConfig, folder: Path) -> None:
    """ranges.png, tiers.png, percentiles.png and treatment.png."""
    statistics = plan.statistics
    rows = [Row(kind_of(path), block_of(path)) for path in statistics.inputs]
    largest = np.stack([found.absmax.max(axis=1) for found in statistics.inputs.values()])
    bits = np.stack([config.layers[path].bits for path in statistics.inputs])
    plots.range_map(largest, rows, config.sigmas, folder / "ranges.png")
    plots.tier_map(bits, rows, config.sigmas, folder / "tiers.png")
    paths = list(statistics.inputs)
    widest = widest_of_each_kind(paths, largest.max(axis=1))
    curves = {label(path): percentile_curves(plan, path) for path in widest[:PANELS]}
    plots.percentile_bands(curves, config.sigmas, folder / "percentiles.png")
    if treated := treatments(plan, config):
        plots.before_and_after(treated, folder / "treatment.png")


def widest_of_each_kind(paths: list[str], widths: np.ndarray) -> list[str]:
    """The widest input of each kind, widest kind first."""
    order = sorted(zip(widths, paths, strict=True), reverse=True)
    first: dict[str, str] = {}
    for _, path in order:
        first.setdefault(kind_of(path), path)
    return list(first.values())


def label(path: str) -> str:
    return f"block {block_of(path)}, {kind_of(path)}"


def percentile_curves(plan: Plan, path: str) -> dict[str, np.ndarray]:
    found = plan.statistics.inputs[path]
    shares = {"p50": 0.5, "p99": 0.99, "p999": 0.999, "p100": 1.0}
    tops = found.absmax.max(axis=1)
    return {
        name: np.array(
            [
                histogram.percentile(hist, share, top)
                for hist, top in zip(found.hist, tops, strict=True)
            ]
        )
        for name, share in shares.items()
    }


def treatments(plan: Plan, config: QuantConfig) -> list[Treatment]:
    """The inputs whose range shift and smoothing narrow most, at their widest step."""
    found = []
    for path, statistics in plan.statistics.inputs.items():
        layer = config.layers[path]
        if layer.shift is None and layer.smoothing is None:
            continue
        step = int(statistics.absmax.max(axis=1).argmax())
        before = statistics.minimum[step], statistics.maximum[step]
        shift = 0.0 if layer.shift is None else layer.shift
        factor = 1.0 if layer.smoothing is None else layer.smoothing
        after = (before[0] - shift) / factor, (before[1] - shift) / factor
        narrowed = np.abs(before).max() / max(np.abs(after).max(), 1e-30)
        parts = [] if layer.shift is None else ["shift"]
        if layer.smoothing is not None:
            parts.append(f"smoothing {plan.smoothing[path].strength:g}")
        found.append((narrowed, Treatment(label(path), before, after, " and ".join(parts))))
    found.sort(key=lambda item: -item[0])
    return [treatment for _, treatment in found[:TREATED]]
