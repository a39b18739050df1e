"""Changes instead of values: what MoDiff gives to nano at few bits, and what it costs.

    python -m tools.bench_modiff --num-pictures 2000 --steps 20 --work modiff_work

Every row draws the same captions from the same noise with nano's weights at 16, 8 or 4 bits and
its inputs at 16, 8, 6, 4 or 3 bits: plain, or modulated; with static scales or dynamic ones (of
each picture). Captions are those of scenes that are rendered too:

- latent SQNR of the finished pictures against full precision's of the same noise, in dB; and
  against those of the row's own weights with inputs in floats;
- FID and sFID of the scorer's features to the rendered scenes, Inception Score;
- Fréchet distance to full precision's pictures from other noise, whose floor is the row "other
  noise".

Rows are drawn in --work by `src.sample`, one folder each, the most wanted ones first: a killed run
goes on with the batch it was at, and under mlx.launch each rank draws every nth batch. With
--seconds a run stops in time, with --each a row has so many of its pictures afterwards; both go on
by the same command. --rows draws some of them, so that several machines can share the work:
results_…/ holds one small file a row, which --merge takes in, and a copy of other_noise_…/ spares
the others that row. All results are written to
docs/benchmarks/modiff.json and modiff.md after every row, and by --report-only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.cli import command
from src.distributed import Ranks
from src.evaluation.networks import ScorerNetwork
from src.models.nano.captions import captions
from src.quant.block_rounding import METHODS
from src.store import write_bytes

import click

from tools.bench_common import machine, write_report
from tools.modiff_results import Limit, Took, merged, without
from tools.modiff_rows import (
    HEAD,
    SIXTEEN,
    Row,
    all_rows,
    auto_lines,
    by_priority,
    chosen_rows,
    drawn_where,
    goals,
    line,
)
from tools.modiff_work import KEPT_LATENTS, Bench

KEPT = (
    "dtype",
    "scale_pictures",
    "method",
    "iters",
    "num_images",
    "kernel",
)  # settings, in the JSON
ONE_OR_MORE = click.IntRange(min=1)


def report(bench: Bench, merge: Sequence[Path]) -> None:
    """The table of all results that there are, in the order of the rows."""
    found = merged([bench.results, *merge], bench.run)
    rows = {row.name: found[row.name] for row in all_rows() if row.name in found}
    judged = [*(goal.judged(rows) for goal in goals()), *auto_lines(rows)]
    lines = [
        f"nano, {bench.steps} steps, guidance 4, each row the same captions and noise; dB over the "
        f"first {KEPT_LATENTS} pictures where there are so many. Dynamic scales are those of each "
        "picture. FID and sFID are to as many rendered scenes of the same captions as the row has "
        "pictures; the last column is the Fréchet distance to as many of full precision's pictures "
        "from other noise. These distances fall as sets grow, so only those of equal counts can be "
        "compared, as it is done below.",
        "",
        *HEAD,
        *(line(name, row) for name, row in rows.items()),
        "",
        *drawn_where(rows),
        "",
        "What was to be reached (dB of A8, A4 and auto against the same weights with inputs in "
        "floats):",
        "",
        *(text for text in judged if text is not None),
    ]
    here = machine()
    here["command"] = without(here["command"], "--rows")  # the table is of all rows
    data = {
        "machine": here,
        "steps": bench.steps,
        "tracks": {k: v for k, v in bench.tracks.items() if k in KEPT},
        "rows": rows,
    }
    write_report("modiff", "MoDiff on nano", data, lines)


@command()
@click.option("--work", type=Path, default=Path("modiff_work"), help="Folder.")
@click.option("--num-pictures", default=2000, type=ONE_OR_MORE, help="A row, in the end.")
@click.option("--each", type=ONE_OR_MORE, help="Pictures that a row has after this run.  [all]")
@click.option("--seconds", type=float, help="After which no batch is begun.  [no limit]")
@click.option("--steps", default=100, type=ONE_OR_MORE, help="Of sampling.")
@click.option("--batch", default=256, type=ONE_OR_MORE, help="Pictures at once.")
@click.option("--rows", help="Parts of rows' names, separated by semicolons.  [default: all]")
@click.option("--report-only", is_flag=True, help="Draw nothing; judge what is there.")
@click.option("--merge", type=Path, multiple=True, help="A folder of other results; repeat.")
@click.option("--adaround-output-8", type=Path, help="Weights of 8 bits.  [made in --work]")
@click.option("--adaround-output-4", type=Path, help="Weights of 4 bits.  [made in --work]")
@click.option("--quant-config", type=Path, help="That they were rounded with.  [made in --work]")
@click.option("--scale-pictures", default=8, help="For static scales.")
@click.option("--kernel", help="Of quantized layers.  [default: each layer's fastest]")
@click.option("--dtype", help="float16 or float32.  [default: the device's]")
@click.option("--method", default="adaround", help=", ".join(METHODS))
@click.option("--iters", default=1000, help="Of learned rounding.")
@click.option("--num-images", default=16, help="To calibrate with.")
def main(
    work: Path,
    num_pictures: int,
    each: int | None,
    seconds: float | None,
    steps: int,
    batch: int,
    rows: str | None,
    report_only: bool,
    merge: Sequence[Path],
    **tracks: Any,
) -> None:
    """Measure MoDiff on nano."""
    ranks, limit = Ranks.here(), Limit(seconds, each)
    if seconds is not None and ranks.size > 1:
        raise click.UsageError("--seconds is for one process; split the work by --rows")
    bench, eyes = Bench(work, num_pictures, steps, batch, tracks), ScorerNetwork()
    chosen = by_priority(chosen_rows(rows))
    known = [bench.results] if bench.results.is_dir() else []
    merged([*known, *merge], bench.run)  # what is wrong with them is told before any is drawn
    if ranks.rank == 0:
        bench.results.mkdir(parents=True, exist_ok=True)
        write_bytes(bench.prompts, "\n".join(captions(bench.scenes())).encode() + b"\n")
    ranks.barrier()
    if not report_only:
        draw_rows(bench, chosen, eyes, limit, merge)
    if ranks.rank == 0:
        bench.judge_all(eyes, afresh=report_only)
        report(bench, merge)


def draw_rows(
    bench: Bench, rows: Sequence[Row], eyes: ScorerNetwork, limit: Limit, merge: Sequence[Path]
) -> None:
    ranks, todo = Ranks.here(), [row for row in rows if bench.lacks(row, limit)]
    ranks.barrier()  # all have looked before one draws
    for bits in sorted({row.weight_bit for row in todo} - {SIXTEEN}):
        bench.weights(bits)  # on all ranks: the stages split their work
    for row in todo:
        if not limit.time_left():
            click.echo(f"time is up before {row.name}; the same command goes on")
            return
        before, start = len(bench.whole(row)), time.perf_counter()
        bench.draw(row, limit)
        ranks.barrier()
        new, spent = bench.whole(row)[before:], time.perf_counter() - start
        took = Took(sum(len(b) for b in new), spent)
        if ranks.rank == 0 and new:
            bench.judge(row, eyes, took)
            report(bench, merge)
            click.echo(line(row.name, bench.result(row)))
            click.echo(f"{took.pictures} pictures in {took.seconds:.1f} s")


if __name__ == "__main__":
    main()
