"""What quantized activations cost nano, and what collecting their statistics costs.

    python -m tools.bench_activations --captions 64 --stride 5

Weights stay at 16 bits. Fidelity is teacher-forced: the velocity's SQNR on the trajectories of
captions that calibration never saw, mean over steps. Writes docs/benchmarks/activations.json and
activations.md. The calibration folder is made if it is missing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import src  # noqa: F401  before mlx, for OpenBLAS
from src.activation_track.plan import Plan
from src.calibration import statistics as collecting
from src.calibration.activations import ActivationStatistics
from src.calibration.replay import strided_pairs, transformer_inputs
from src.calibration.sensitivity import Samples, spread_pairs
from src.calibration.trajectories import open_with_pipeline
from src.collect_layer_activations import collect_layer_activations
from src.generate_calibration_data import generate_calibration_data
from src.metrics.fidelity import (
    bootstrap_interval,
    reference_trajectories,
    teacher_forced_sqnr,
)
from src.models.paths import block_linears, replaced
from src.models.prompts import load_prompts
from src.quant.artifacts import LayerConfig
from src.quant.grid import activation_limit
from src.quant.plan import largest_values, one_shift
from src.quant.simulate import (
    CurrentStep,
    Quantizer,
    SimulatedLinear,
    static_quantizer,
    token_quantizer,
)
from src.quant.temporal import kind_of
from src.quant.tiers import Thresholds

import click
import mlx.core as mx
import numpy as np

from tools.bench_common import machine, write_report

Layers = dict[str, LayerConfig]
Make = Callable[[CurrentStep, LayerConfig], Quantizer]
BITS = (8, 6, 4)


class Bench:
    """nano with its calibration, and how well any activation config keeps its velocity."""

    def __init__(self, folder: Path, captions: int, stride: int) -> None:
        if not (folder / "manifest.json").exists():
            generate_calibration_data("nano", folder)
        collect_layer_activations(folder)
        self.trajectories, self.pipeline = open_with_pipeline(folder)
        self.model = self.pipeline.transformer
        self.stats = ActivationStatistics.open(folder / "activations")
        prompts = load_prompts("nano_evaluation")[:captions]
        self.reference = reference_trajectories(
            self.pipeline, prompts, num_steps=self.trajectories.num_steps, stride=stride
        )
        self.steps = len(self.stats.step_keys)

    def plan(self, two_regions: str, segments: int = 0) -> Plan:
        pairs = spread_pairs(self.trajectories.num_images, self.stats.step_keys, 4)
        samples = Samples.load(self.trajectories, self.pipeline, pairs)
        return Plan(self.stats, self.model, samples, (4, 6, 8), Thresholds(), segments, two_regions)

    def per_linear(self, by_input: Layers) -> Layers:
        return {
            path: by_input[source]
            for path, source in self.stats.layers.items()
            if source in by_input
        }

    def measure(self, by_input: Layers, make: Make = static_quantizer) -> np.ndarray:
        """(captions,) dB, mean over steps."""
        step, linears = CurrentStep(self.stats.sigmas), block_linears(self.model)
        modules = {
            path: SimulatedLinear(linears[path], make(step, layer))
            for path, layer in self.per_linear(by_input).items()
        }
        with replaced(self.model, modules):
            table = teacher_forced_sqnr(step.following(self.model), self.reference)
        return table.mean(axis=0)


def one_scale(bench: Bench, path: str, bits: int) -> LayerConfig:
    largest = bench.stats.inputs[path].absmax.max()
    return absmax_layer(np.full(bench.steps, largest), bits)


def per_step(bench: Bench, path: str, bits: int) -> LayerConfig:
    return absmax_layer(bench.stats.inputs[path].absmax.max(axis=1), bits)


def with_shift(bench: Bench, path: str, bits: int) -> LayerConfig:
    found = bench.stats.inputs[path]
    shift = one_shift(found.shift)
    return absmax_layer(largest_values(found.minimum, found.maximum, shift), bits, shift)


def absmax_layer(largest: np.ndarray, bits: int, shift: np.ndarray | None = None) -> LayerConfig:
    scales = [float(np.float32(top / activation_limit(bits))) for top in largest]
    return LayerConfig([bits] * len(scales), scales, shift)


def rungs(bench: Bench, paths: Iterable[str]) -> dict[str, tuple[Callable[[int], Layers], Make]]:
    """Name of a rung to what makes its layers for a tier."""
    paths = list(paths)

    def simple(layer: Callable[[Bench, str, int], LayerConfig]) -> Callable[[int], Layers]:
        return lambda bits: {path: layer(bench, path, bits) for path in paths}

    def planned(plan: Plan) -> Callable[[int], Layers]:
        def make(bits: int) -> Layers:
            return {
                path: plan.tables[path].layer([bits] * bench.steps, plan.segments, 1.1)
                for path in paths
            }

        return make

    smoothed, both = bench.plan("post-gelu"), bench.plan("all")
    for plan in (smoothed, both):
        plan.search_smoothing([path for path in paths if not path.endswith("fc2")])
    plans = {
        "+ clip search": bench.plan("none"),
        "+ two regions behind GELU": bench.plan("post-gelu"),
        "+ the same, 3 segments": bench.plan("post-gelu", 3),
        "+ searched smoothing, all but fc2": smoothed,
        "two regions everywhere": bench.plan("all"),
        "two regions everywhere, smoothing": both,
    }
    ladder = {
        "one absmax scale": (simple(one_scale), static_quantizer),
        "per step": (simple(per_step), static_quantizer),
        "+ shift of fc2": (simple(with_shift), static_quantizer),
    }
    ladder |= {name: (planned(plan), static_quantizer) for name, plan in plans.items()}
    return ladder | {"dynamic per token": (simple(one_scale), token_quantizer)}


def ladder_table(bench: Bench, paths: list[str], bits: tuple[int, ...]) -> dict[str, dict]:
    """Rung to tier to mean and interval of its dB."""
    table: dict[str, dict] = {}
    for name, (layers, make) in rungs(bench, paths).items():
        table[name] = {}
        for tier in bits:
            values = bench.measure(layers(tier), make)
            low, high = bootstrap_interval(values)
            table[name][f"A{tier}"] = {"dB": float(values.mean()), "interval": [low, high]}
        click.echo(f"{name}: {cells(table[name])}")
    return table


def cells(row: dict) -> str:
    found = ((value["dB"], *value["interval"]) for value in row.values())
    return " | ".join(f"{mean:.1f} ({low:.1f} to {high:.1f})" for mean, low, high in found)


def policies(bench: Bench, two_regions: str) -> dict[str, dict]:
    """Both policies and uniform tiers, with 3 segments."""
    plan = bench.plan(two_regions, 3)
    effects = plan.leave_one_out(lambda: None)
    thresholds = plan.by_thresholds()
    spent = plan.average_bits(thresholds)
    chosen = {
        "thresholds": thresholds,
        "error, as many bits as thresholds": plan.by_error(effects, spent, None),
        "error, 5 bits": plan.by_error(effects, 5.0, None),
        "error, 6 bits": plan.by_error(effects, 6.0, None),
        "error, 7 bits": plan.by_error(effects, 7.0, None),
        "uniform A6": plan.uniform(6),
        "uniform A8": plan.uniform(8),
    }
    table = {}
    for name, bits in chosen.items():
        by_input = {p: t.layer(bits[p], plan.segments, 1.1) for p, t in plan.tables.items()}
        values = bench.measure(by_input)
        table[name] = {
            "bits": plan.average_bits(bits),
            "dB": float(values.mean()),
            "interval": list(bootstrap_interval(values)),
        }
        click.echo(f"{name}: {table[name]}")
    return table


def overhead(bench: Bench, rounds: int) -> dict[str, float]:
    """Seconds of plain forwards and of forwards with the reductions in them, in turn."""
    pairs = strided_pairs(bench.trajectories, 1, bench.trajectories.num_steps // 4)[:4]
    inputs = transformer_inputs(bench.trajectories, pairs, bench.pipeline.dtype)
    plain, collected = [], []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        mx.eval(bench.model(*inputs))
        middle = time.perf_counter()
        collecting.collect(bench.model, inputs, len(pairs))
        plain.append(middle - start)
        collected.append(time.perf_counter() - middle)
    ratios = [c / p for c, p in zip(collected[1:], plain[1:], strict=True)]
    return {
        "plain_s": statistics.median(plain[1:]),
        "collecting_s": statistics.median(collected[1:]),
        "ratio": statistics.median(ratios),
    }


def ladder_lines(title: str, table: dict[str, dict]) -> list[str]:
    tiers = list(next(iter(table.values())))
    head = [f"## {title}", "", f"| | {' | '.join(tiers)} |", "|---" * (1 + len(tiers)) + "|"]
    return [*head, *(f"| {name} | {cells(row)} |" for name, row in table.items()), ""]


def policy_lines(title: str, table: dict[str, dict]) -> list[str]:
    lines = [f"## {title}", "", "| | average bits | dB |", "|---|---|---|"]
    for name, row in table.items():
        lines.append(f"| {name} | {row['bits']:.2f} | {cells({'': row})} |")
    return [*lines, ""]


@click.command()
@click.option("--calib-dir", default="calibration_data", show_default=True, type=Path)
@click.option("--captions", default=64, show_default=True)
@click.option("--stride", default=5, show_default=True, help="Every which step is judged.")
@click.option("--rounds", default=9, show_default=True, help="Of the cost's measurement.")
def main(calib_dir: Path, captions: int, stride: int, rounds: int) -> None:
    """Measure the ladder, image fc2 by itself, both policies, and the cost of collecting."""
    bench = Bench(calib_dir, captions, stride)
    cost = overhead(bench, rounds)
    click.echo(f"collecting: {cost}")
    fc2 = [path for path in bench.stats.inputs if kind_of(path) == "image fc2"]
    data = {
        "machine": machine(),
        "captions": captions,
        "overhead": cost,
        "ladder": ladder_table(bench, list(bench.stats.inputs), BITS),
        "image_fc2": ladder_table(bench, fc2, (8, 6)),
        "policies": policies(bench, "post-gelu"),
    }
    lines = [
        "Velocity SQNR in dB (95% interval over captions), weights at 16 bits, "
        f"{captions} captions that calibration never saw, every {stride}th of 30 steps.",
        "",
        *ladder_lines("All inputs", data["ladder"]),
        *ladder_lines("Image fc2 alone, all else in floats", data["image_fc2"]),
        *policy_lines("Policies, 3 segments", data["policies"]),
        "## Collecting statistics",
        "",
        f"A forward with the reductions takes {cost['ratio']:.2f} times a plain one "
        f"({cost['collecting_s']:.3f} s against {cost['plain_s']:.3f} s, 4 steps with guidance, "
        f"median of {rounds} paired rounds).",
    ]
    write_report("activations", "Quantized activations of nano", data, lines)


if __name__ == "__main__":
    main()
