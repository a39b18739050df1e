"""What quantized activations cost nano, rung by rung.

    python -m tools.bench_activations --captions 64 --stride 6

Protocol and shared parts: tools/activation_lab.py. Intervals are 95% bootstrap over captions, of
the paired gain over one absmax scale. Writes docs/benchmarks/activations.json and activations.md.
The calibration folder is made if it is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from src.quant.simulate import Quantizer

import click
import mlx.core as mx

from tools.activation_lab import ALL_STEPS, Lab, Quantizers, lab_options, measured, table_lines
from tools.bench_common import machine, write_report

BITS = (8, 6, 4)
ONE_SCALE = "one absmax scale"
GOALS = {8: 4.0, 6: 9.0}  # dB that static scales, as the stage makes them, should gain
DEFAULT = "**default: + 3 scales a layer**"
# What a rung lets the stage do, from the clip search on, and how many scales a layer may have over
# the steps.
STAGE_RUNGS = {
    "+ clip search": ({"two_regions": "none", "smooth": "none"}, ALL_STEPS),
    "+ two regions behind GELU": ({"two_regions": "post-gelu", "smooth": "none"}, ALL_STEPS),
    "+ two regions where codes fit into a byte": ({"smooth": "none"}, ALL_STEPS),
    "+ smoothing where it folds": ({}, ALL_STEPS),
    DEFAULT: ({}, 3),
    "default, but smoothing only of spikes": ({"smooth": "spikes"}, 3),
    "default, but two regions everywhere": ({"two_regions": "all"}, 3),
    "default, but fc2 smoothed too": ({"smooth": "all"}, 3),
}


def rungs(lab: Lab, bits: int) -> dict[str, Callable[[], Quantizers]]:
    """Name of a rung to what makes its quantizers."""

    def stage(settings: dict[str, object], segments: int) -> Quantizers:
        plan = lab.plan(tiers=(bits,), **settings)
        return lab.planned(plan, plan.uniform(bits), segments)

    ladder = {
        ONE_SCALE: partial(lab.one_scale, bits, lab.paths),
        "per step": partial(lab.per_step, bits, lab.paths),
        "+ shift of fc2": partial(lab.with_shift, bits, lab.paths),
    }
    ladder |= {name: partial(stage, *how) for name, how in STAGE_RUNGS.items()}
    return ladder | {"dynamic: a scale per token": partial(lab.per_token, bits, lab.paths)}


def half_precision(x: mx.array) -> mx.array:
    return x.astype(mx.float16).astype(x.dtype)


def floor(lab: Lab) -> float:
    """dB with every linear's input rounded to float16."""
    quantizers: dict[str, Quantizer] = dict.fromkeys(lab.paths, half_precision)
    return float(lab.measure(quantizers).mean())


@click.command()
@lab_options(stride=6)
def main(calib_dir: Path, captions: int, stride: int) -> None:
    """Measure the ladder at A8, A6 and A4, and the floor of float16."""
    lab = Lab(calib_dir, captions, stride)
    data = {"machine": machine(), "captions": captions, "stride": stride, "floor": floor(lab)}
    lines = [
        f"{lab.protocol()} Gains over one absmax scale are paired over the captions, with 95% "
        "bootstrap intervals. The row in bold is what the stage does by default; those below it "
        f"are variants of it. Inputs rounded to float16 alone: {data['floor']:.1f} dB.",
        "",
    ]
    for bits in BITS:
        click.echo(f"A{bits}")
        table = data[f"A{bits}"] = measured(lab, rungs(lab, bits), ONE_SCALE)
        goal = f" (goal of the default: {GOALS[bits]:+.0f} dB)" if bits in GOALS else ""
        lines += [f"## A{bits}{goal}", "", *table_lines(table, "gain", {})]
    write_report("activations", "Quantized activations of nano", data, lines)


if __name__ == "__main__":
    main()
