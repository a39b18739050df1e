"""Tiers by measured error, by thresholds, and uniform.

    python -m tools.bench_policies --captions 64 --stride 8

Protocol: tools/activation_lab.py. Writes docs/benchmarks/activations_policies.json and
activations_policies.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from tools.activation_lab import Lab, Quantizers, lab_options, measured, table_lines
from tools.bench_common import machine, write_report

AVERAGES = (5.0, 6.0, 7.0)
UNIFORM_A6 = "uniform A6"
ERROR = "error, {:g} bits"


def policies(lab: Lab) -> tuple[dict[str, Callable[[], Quantizers]], dict[str, float]]:
    """Name of a choice of tiers to its quantizers, and to its average bits."""
    plan = lab.plan()
    effects = plan.leave_one_out(lambda: None)
    thresholds = plan.by_thresholds()
    spent = plan.average_bits(thresholds)
    chosen = {
        UNIFORM_A6: plan.uniform(6),
        "thresholds": thresholds,
        "error, as many bits as thresholds": plan.by_error(effects, spent, None),
    }
    chosen |= {ERROR.format(bits): plan.by_error(effects, bits, None) for bits in AVERAGES}
    chosen["uniform A8"] = plan.uniform(8)
    bits = {name: plan.average_bits(tiers) for name, tiers in chosen.items()}
    return {name: partial(lab.planned, plan, tiers) for name, tiers in chosen.items()}, bits


@click.command()
@lab_options(stride=8)
def main(calib_dir: Path, captions: int, stride: int) -> None:
    """Measure both policies against uniform tiers."""
    lab = Lab(calib_dir, captions, stride)
    data = {"machine": machine(), "captions": captions, "stride": stride}
    choices, bits = policies(lab)
    table = measured(lab, choices, UNIFORM_A6)
    data["policies"] = {name: {**row, "bits": bits[name]} for name, row in table.items()}
    lines = [
        f"{lab.protocol()} Gains over uniform A6 are paired over the captions, with 95% bootstrap "
        "intervals. All is as the stage does it by default, but for the tiers. Goals of `error` at "
        "6 bits: uniform A6 + 3 dB, `thresholds` + 5 dB.",
        "",
        *table_lines(data["policies"], f"against {UNIFORM_A6}", {"bits": "average bits"}),
    ]
    write_report("activations_policies", "Tiers by error and by thresholds", data, lines)


if __name__ == "__main__":
    main()
