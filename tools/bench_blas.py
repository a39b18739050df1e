"""How much OpenBLAS speeds up MLX on the CPU: the same product with and without, side by side.

    python -m tools.bench_blas --rounds 5

Each round starts one process with the bundled BLAS and one with OpenBLAS, in turn, so that a
machine whose speed drifts treats both alike. Writes docs/benchmarks/blas.json and blas.md.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import click

from tools.bench_common import machine, write_report

WORKER = """
import json, statistics, time
import src
import mlx.core as mx
from src import blas

mx.set_default_device(mx.cpu)
x = mx.random.normal((512, 1536))
weights = dict(linear=mx.random.normal((6144, 1536)).T, plain=mx.random.normal((1536, 6144)))
mx.eval(x, *weights.values())

def seconds(weight, repeats):
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        mx.eval(x @ weight)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])

print(json.dumps([blas.describe(), {k: seconds(w, REPEATS) for k, w in weights.items()}]))
"""
LAYOUTS = {
    "linear": "a linear layer's, x Wᵀ with W 6144x1536",
    "plain": "both factors row by row",
}


def measure(repeats: int, **environment: str) -> tuple[str, dict[str, float]]:
    """Which BLAS, and its median seconds for each layout, in a process of its own."""
    out = subprocess.run(
        [sys.executable, "-c", WORKER.replace("REPEATS", str(repeats))],
        env={**os.environ, **environment},
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        check=True,
        text=True,
    )
    name, seconds = json.loads(out.stdout)
    return name, seconds


@click.command()
@click.option("--rounds", default=5, show_default=True)
def main(rounds: int) -> None:
    """Measure a float32 512x1536x6144 product with MLX's bundled BLAS and with OpenBLAS."""
    rows = []
    for _ in range(rounds):
        slow_name, slow = measure(2, DITQ_BLAS="off")
        fast_name, fast = measure(20, DITQ_BLAS="")
        rows.append({"bundled_s": slow, "openblas_s": fast})
        click.echo(f"bundled {slow}, OpenBLAS {fast}")
    gflop = 2 * 512 * 1536 * 6144 / 1e9
    lines = [
        "| layout | bundled, GFLOP/s | OpenBLAS, GFLOP/s | times as fast |",
        "|---|---|---|---|",
    ]
    medians = {}
    for layout, words in LAYOUTS.items():
        slow = statistics.median(row["bundled_s"][layout] for row in rows)
        fast = statistics.median(row["openblas_s"][layout] for row in rows)
        ratios = sorted(row["bundled_s"][layout] / row["openblas_s"][layout] for row in rows)
        medians[layout] = statistics.median(ratios)
        lines.append(
            f"| {words} | {gflop / slow:.1f} | {gflop / fast:.0f} | **{medians[layout]:.0f}** "
            f"({ratios[0]:.0f} to {ratios[-1]:.0f}) |"
        )
    lines += ["", f"Medians of {rounds} rounds, each one process with and one without, in turn."]
    data = {"machine": machine(), "bundled": slow_name, "openblas": fast_name}
    data |= {"rounds": rows, "median_ratio": medians}
    write_report("blas", "float32 512x1536x6144 on the CPU", data, lines)
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
