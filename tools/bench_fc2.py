"""What brings static A8 near to a scale per token where nano loses most: the inputs of image fc2.

    python -m tools.bench_fc2 --captions 64 --stride 8

Only these inputs are quantized, then only the others. Beside what the stage does stand the
candidates that it does not use; they live here. Protocol: tools/activation_lab.py. Writes
docs/benchmarks/activations_fc2.json and activations_fc2.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from src.calibration.replay import transformer_inputs
from src.calibration.sensitivity import Samples, sampled_rows
from src.models.paths import module_at
from src.quant import smooth
from src.quant.clip import clipped_scale
from src.quant.grid import activation_limit
from src.quant.plan import largest_values, one_shift
from src.quant.simulate import Quantizer
from src.quant.temporal import kind_of

import click
import mlx.core as mx
import numpy as np

from tools.activation_lab import (
    ALL_STEPS,
    Lab,
    Quantizers,
    absmax_layer,
    lab_options,
    measured,
    table_lines,
)
from tools.bench_common import machine, write_report

IMAGES, TOKENS = 3, 96  # of which rows are sampled at each step
GROUP = 64  # channels that share a scale
PLAIN_STAGE = {"two_regions": "none", "smooth": "none"}
TOKEN = "a scale per token"

Transform = Callable[[mx.array], mx.array]
Rows = dict[str, list[np.ndarray]]  # per input and step (rows, channels)


def same(x: mx.array) -> mx.array:
    return x


def rows_of(lab: Lab) -> Rows:
    """Rows of calibration images at every step, for the candidates' own scales."""
    rows: Rows = {path: [] for path in lab.paths}
    for step in lab.statistics.step_keys:
        pairs = [(image, step) for image in range(IMAGES)]
        inputs = transformer_inputs(lab.trajectories, pairs, lab.pipeline.dtype)
        samples = Samples(pairs, inputs, lab.trajectories.cfg_weight, mx.zeros(1))
        for path, found in sampled_rows(lab.model, samples, TOKENS).items():
            rows[path].append(np.concatenate(found))
    return rows


@dataclass(frozen=True)
class Candidate:
    """codes = clip(round(transform(x − centre) / scale)), a clip-searched scale for each step."""

    transform: Transform = same  # and back
    mean_centre: bool = False  # the channels' means, else no shift
    correct: bool = False  # each step's mean error of each channel is added

    def quantizer(self, lab: Lab, rows: Rows, bits: int, path: str) -> Quantizer:
        limit, here = activation_limit(bits), rows[path]
        centre = np.mean([x.mean(axis=0) for x in here], axis=0) if self.mean_centre else 0.0
        scales, errors = [], []
        for x in here:
            values = np.array(self.transform(mx.array((x - centre).astype(np.float32))))
            flat = np.abs(values).reshape(-1)
            scale, _ = clipped_scale(flat, np.ones(len(flat)), float(flat.max()), bits)
            rounded = np.clip(np.rint(values / scale), -limit, limit) * scale
            scales.append(scale)
            errors.append((values - rounded).mean(axis=0) * self.correct)
        scale_table, error_table = (mx.array(np.array(t, np.float32)) for t in (scales, errors))
        middle = mx.array(np.asarray(centre, dtype=np.float32))

        def quantize(x: mx.array) -> mx.array:
            scale = lab.current.per_row(scale_table, x)
            codes = mx.clip(mx.round(self.transform(x - middle) / scale), -limit, limit)
            error = error_table[lab.current.rows][:, None]
            return self.transform(codes * scale + error) + middle

        return quantize


ROTATED = Candidate(mx.hadamard_transform)  # which is its own inverse
CANDIDATES = {
    "clip search, no shift": Candidate(),
    "clip search, mean error taken out": Candidate(correct=True),
    "Hadamard rotation": ROTATED,
    "Hadamard rotation, mean as shift": Candidate(mx.hadamard_transform, mean_centre=True),
}


def finer(lab: Lab, bits: int, path: str, strength: float, group: int) -> Quantizer:
    """Absmax scales that differ along K, by factors that would be folded into the weights."""
    found = lab.statistics.inputs[path]
    shift = one_shift(found.shift)
    widths = np.maximum(shift - found.minimum, found.maximum - shift).max(axis=0)
    widths = np.repeat(widths.reshape(-1, group).max(axis=1), group)
    columns = np.abs(np.array(module_at(lab.model, path).weight)).max(axis=0)
    columns = np.repeat(columns.reshape(-1, group).max(axis=1), group)
    factors = smooth.factors(widths, columns, strength)
    largest = largest_values(found.minimum, found.maximum, shift, factors)
    layer = absmax_layer(largest, bits, shift)
    return lab.static({path: type(layer)(layer.bits, layer.scale, shift, factors)})[path]


def candidates(
    lab: Lab, rows: Rows, bits: int, paths: list[str]
) -> dict[str, Callable[[], Quantizers]]:
    """Name to what makes the quantizers of image fc2."""

    def each(make: Callable[[str], Quantizer]) -> Quantizers:
        return {path: make(path) for path in paths}

    def stage(settings: dict[str, object]) -> Quantizers:
        plan = lab.plan(tiers=(bits,), **settings)
        made = lab.planned(plan, plan.uniform(bits), ALL_STEPS)
        return {path: made[path] for path in paths}

    found = {
        TOKEN: partial(lab.per_token, bits, paths),
        "**two regions (the stage's choice)**": partial(stage, {"smooth": "none"}),
        "absmax": partial(lab.per_step, bits, paths),
        "absmax with the shift": partial(lab.with_shift, bits, paths),
        "shift and clip search": partial(stage, PLAIN_STAGE),
    }
    for strength in (0.5, 1.0):
        for group in (1, GROUP):
            what = "channel" if group == 1 else f"{group} channels"
            make = partial(finer, lab, bits, strength=strength, group=group)
            found[f"a scale per {what}, strength {strength:g}"] = partial(each, make)
    for name, candidate in CANDIDATES.items():
        found[name] = partial(each, partial(candidate.quantizer, lab, rows, bits))
    return found


def others(
    lab: Lab, rows: Rows, bits: int, paths: list[str]
) -> dict[str, Callable[[], Quantizers]]:
    """The same for all other inputs: what the stage makes of them, and a rotation."""

    def stage() -> Quantizers:
        plan = lab.plan(tiers=(bits,))
        made = lab.planned(plan, plan.uniform(bits), ALL_STEPS)
        return {path: made[path] for path in paths}

    rotated = partial(ROTATED.quantizer, lab, rows, bits)
    return {
        TOKEN: partial(lab.per_token, bits, paths),
        "the stage's default": stage,
        "Hadamard rotation": lambda: {path: rotated(path) for path in paths},
    }


@click.command()
@lab_options(stride=8)
def main(calib_dir: Path, captions: int, stride: int) -> None:
    """Measure candidates for image fc2 at A8, and a rotation of all else at A8 and A6."""
    lab = Lab(calib_dir, captions, stride)
    rows = rows_of(lab)
    fc2 = [path for path in lab.paths if kind_of(path) == "image fc2"]
    rest = [path for path in lab.paths if path not in fc2]
    data = {"machine": machine(), "captions": captions, "stride": stride}
    data["image_fc2_A8"] = measured(lab, candidates(lab, rows, 8, fc2), TOKEN)
    lines = [
        f"{lab.protocol()} Gains are paired over the captions, with 95% bootstrap intervals. "
        "Each step has its own scale.",
        "",
        "## Image fc2 alone at A8",
        "",
        *table_lines(data["image_fc2_A8"], f"against {TOKEN}", {}),
    ]
    for bits in (8, 6):
        table = data[f"others_A{bits}"] = measured(lab, others(lab, rows, bits, rest), TOKEN)
        title = f"## All other inputs alone at A{bits}"
        lines += [title, "", *table_lines(table, f"against {TOKEN}", {})]
    write_report("activations_fc2", "Static scales for image fc2", data, lines)


if __name__ == "__main__":
    main()
