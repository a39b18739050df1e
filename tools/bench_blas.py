"""How much OpenBLAS speeds up MLX on the CPU: the same product with and without, side by side.

    python tools/bench_blas.py --rounds 5

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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.bench_common import machine, write_report

WORKER = """
import json, statistics, time
import src
import mlx.core as mx
from src import blas

mx.set_default_device(mx.cpu)
a, b = mx.random.normal((512, 1536)), mx.random.normal((1536, 6144))
mx.eval(a, b)
mx.eval(a @ b)
times = []
for _ in range({repeats}):
    start = time.perf_counter()
    mx.eval(a @ b)
    times.append(time.perf_counter() - start)
print(json.dumps([statistics.median(times), blas.describe()]))
"""


def measure(repeats: int, **environment: str) -> tuple[float, str]:
    """Median seconds of the product, and which BLAS did it, in a process of its own."""
    out = subprocess.run(
        [sys.executable, "-c", WORKER.format(repeats=repeats)],
        env={**os.environ, **environment},
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        check=True,
        text=True,
    )
    seconds, name = json.loads(out.stdout)
    return seconds, name


@click.command()
@click.option("--rounds", default=5, show_default=True)
def main(rounds: int) -> None:
    """Measure a float32 512x1536x6144 product with MLX's bundled BLAS and with OpenBLAS."""
    rows = []
    for _ in range(rounds):
        slow, slow_name = measure(2, DITQ_BLAS="off")
        fast, fast_name = measure(20, DITQ_BLAS="")
        rows.append({"bundled_s": slow, "openblas_s": fast, "ratio": slow / fast})
        click.echo(f"bundled {slow:.3f} s, OpenBLAS {fast:.4f} s: {slow / fast:.0f} times as fast")
    gflop = 2 * 512 * 1536 * 6144 / 1e9
    summary = {
        key: statistics.median(row[key] for row in rows)
        for key in ("bundled_s", "openblas_s", "ratio")
    }
    data = {"machine": machine(), "bundled": slow_name, "openblas": fast_name}
    data |= {"rounds": rows, "median": summary}
    ratios = [row["ratio"] for row in rows]
    table = [
        "| BLAS | seconds | GFLOP/s |",
        "|---|---|---|",
        *(
            f"| {name} | {summary[key]:.4f} | {gflop / summary[key]:.1f} |"
            for name, key in (("MLX's bundled", "bundled_s"), ("OpenBLAS", "openblas_s"))
        ),
        "",
        f"OpenBLAS is **{summary['ratio']:.0f} times** as fast "
        f"(median of {rounds} paired rounds, {min(ratios):.0f} to {max(ratios):.0f}).",
    ]
    write_report("blas", "float32 512x1536x6144 on the CPU", data, table)


if __name__ == "__main__":
    main()
