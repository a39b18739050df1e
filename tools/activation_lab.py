"""What the benchmarks of the activation track share: nano with its calibration, and the protocol.

Weights stay at 16 bits. Fidelity is teacher-forced: the velocity's SQNR on the trajectories of
captions that calibration never saw, mean over steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

import src  # noqa: F401  before mlx, for OpenBLAS
from src.activation_track.options import Options
from src.activation_track.plan import STEADY, Bits, Plan, open_plan
from src.calibration.activations import ActivationStatistics
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

import click
import numpy as np

Quantizers = dict[str, Quantizer]  # by the path of an input
Layers = dict[str, LayerConfig]
ALL_STEPS = 0  # segments: every step has its own scale
SEGMENTS = Options().segments


def lab_options(stride: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What a command asks for that opens a Lab."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in (
            click.option(
                "--stride", default=stride, show_default=True, help="Every which step is judged."
            ),
            click.option("--captions", default=64, show_default=True),
            click.option("--calib-dir", default="calibration_data", show_default=True, type=Path),
        ):
            command = option(command)
        return command

    return decorate


class Lab:
    """nano with its calibration, and how well any quantizers keep its velocity."""

    def __init__(self, folder: Path, captions: int, stride: int) -> None:
        if not (folder / "manifest.json").exists():
            generate_calibration_data("nano", folder)
        collect_layer_activations(folder)
        self.folder = folder
        self.trajectories, self.pipeline = open_with_pipeline(folder)
        self.model = self.pipeline.transformer
        self.statistics = ActivationStatistics.open(folder / "activations")
        self.paths = list(self.statistics.inputs)
        self.steps = len(self.statistics.step_keys)
        self.current = CurrentStep(self.statistics.sigmas)
        self.prompts = load_prompts("nano_evaluation")[:captions]
        self.stride = stride

    @cached_property
    def reference(self):
        """The 16-bit model's trajectories of the captions, at the judged steps."""
        steps = self.trajectories.num_steps
        return reference_trajectories(
            self.pipeline, self.prompts, num_steps=steps, stride=self.stride
        )

    def protocol(self) -> str:
        return (
            f"Velocity SQNR in dB, weights not quantized ({str(self.pipeline.dtype)[9:]}), "
            f"{len(self.prompts)} captions that calibration never saw, every {self.stride}th of "
            f"{self.trajectories.num_steps} steps; calibration: 5 images, every second step."
        )

    def plan(self, **settings: object) -> Plan:
        """A plan with the stage's own defaults but for these settings, smoothing decided."""
        options = Options(**settings)
        plan = open_plan(self.statistics, self.folder, None, options)
        plan.search_smoothing(plan.to_smooth(options.smooth))
        return plan

    def quantized(self, quantizers: Quantizers) -> AbstractContextManager[None]:
        """The model with these inputs quantized, while the context lasts."""
        linears = block_linears(self.model)
        modules = {
            path: SimulatedLinear(linears[path], quantizers[source])
            for path, source in self.statistics.layers.items()
            if source in quantizers
        }
        return replaced(self.model, modules)

    def measure(self, quantizers: Quantizers) -> np.ndarray:
        """(captions,) dB, mean over steps."""
        reference = self.reference  # drawn, at the first call, by the model as it is
        with self.quantized(quantizers):
            table = teacher_forced_sqnr(self.current.following(self.model), reference)
        return table.mean(axis=0)

    def static(self, layers: Layers) -> Quantizers:
        return {path: static_quantizer(self.current, layer) for path, layer in layers.items()}

    def planned(self, plan: Plan, bits: Bits, segments: int = SEGMENTS) -> Quantizers:
        """What the plan makes of these tiers."""
        tables = plan.tables.items()
        return self.static({p: table.layer(bits[p], segments, STEADY) for p, table in tables})

    def one_scale(self, bits: int, paths: Iterable[str]) -> Quantizers:
        tops = {path: self.statistics.inputs[path].absmax.max() for path in paths}
        return self.static({p: absmax_layer(np.full(self.steps, t), bits) for p, t in tops.items()})

    def per_step(self, bits: int, paths: Iterable[str]) -> Quantizers:
        inputs = self.statistics.inputs
        return self.static({p: absmax_layer(inputs[p].absmax.max(axis=1), bits) for p in paths})

    def with_shift(self, bits: int, paths: Iterable[str]) -> Quantizers:
        layers = {}
        for path in paths:
            found = self.statistics.inputs[path]
            shift = one_shift(found.shift)
            largest = largest_values(found.minimum, found.maximum, shift)
            layers[path] = absmax_layer(largest, bits, shift)
        return self.static(layers)

    def per_token(self, bits: int, paths: Iterable[str]) -> Quantizers:
        layer = absmax_layer(np.ones(self.steps), bits)
        return {path: token_quantizer(self.current, layer) for path in paths}


def absmax_layer(largest: np.ndarray, bits: int, shift: np.ndarray | None = None) -> LayerConfig:
    scales = [float(np.float32(top / activation_limit(bits))) for top in largest]
    return LayerConfig([bits] * len(scales), scales, shift)


def row_of(values: np.ndarray, against: np.ndarray) -> dict[str, object]:
    """Mean dB, and the gain over other values of the same captions with its interval."""
    gains = values - against
    return {
        "dB": float(values.mean()),
        "gain": float(gains.mean()),
        "interval": list(bootstrap_interval(gains)),
    }


def measured(
    lab: Lab, rungs: Mapping[str, Callable[[], Quantizers]], against: str
) -> dict[str, dict]:
    """Every rung's dB and its gain over one of them, told as it comes."""
    values: dict[str, np.ndarray] = {}
    for name, quantizers in rungs.items():
        values[name] = lab.measure(quantizers())
        click.echo(f"{name}: {values[name].mean():.2f} dB")
    return {name: row_of(found, values[against]) for name, found in values.items()}


def table_lines(table: Mapping[str, dict], head: str, columns: Mapping[str, str]) -> list[str]:
    """Markdown: a name, further columns by key, dB and the gain with its interval."""
    names = ["", *columns.values(), "dB", head]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for name, row in table.items():
        low, high = row["interval"]
        cells = [f"{row[key]:.2f}" for key in columns]
        cells += [f"{row['dB']:.1f}", f"{row['gain']:+.1f} ({low:+.1f} to {high:+.1f})"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]
