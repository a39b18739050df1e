"""What a low-rank branch beside 4-bit codes gives nano, and what the same bytes give elsewhere.

    python -m tools.bench_lowrank --captions 64

All weights are rounded by GPTQ, with inputs from calibration images; then the model is asked for
its guided velocity along the 16-bit model's own trajectories of captions that calibration never
saw (teacher-forced), activations as they are. Gains over GPTQ alone are paired over the captions,
with 95% bootstrap intervals. Writes docs/benchmarks/lowrank.json and lowrank.md.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.cache_adaround_data import cache_adaround_data
from src.calibration.block_cache import BlockCache
from src.generate_calibration_data import generate_calibration_data
from src.metrics.fidelity import (
    Reference,
    bootstrap_interval,
    reference_trajectories,
    teacher_forced_sqnr,
)
from src.models.load import load_pipeline
from src.models.mmdit import MMDiT
from src.models.paths import block_linears
from src.models.pipeline import Pipeline
from src.models.prompts import load_prompts
from src.quant.lowrank import Residual, round_residual
from src.quant.observe import input_statistics
from src.weight_track.blocks import BlockWalk, full_path, stand_in_block

import click
import mlx.core as mx
import numpy as np

from tools.bench_common import machine, write_report

BATCH = 8
BASE = "GPTQ alone"


@dataclass(frozen=True)
class Trial:
    """How all layers are rounded."""

    name: str
    rank: int = 0
    bits: int = 4
    group_size: int = 0
    weighting: str = "plain"
    rounds: int = 3

    def round(self, weight: mx.array, hessian: mx.array) -> Residual:
        size = self.group_size
        if size and weight.shape[1] % size:
            size //= 2
        return round_residual(
            weight,
            hessian,
            self.rank,
            bits=self.bits,
            group_size=size,
            weighting=self.weighting,
            rounds=self.rounds,
        )


SIZES = [
    Trial(BASE),
    *(Trial(f"rank {rank}", rank) for rank in (4, 8, 16, 32)),
    Trial("groups of 128, or 64 where these do not divide", group_size=128),
    *(Trial(f"groups of {size}", group_size=size) for size in (64, 32)),
    Trial("rank 16 and groups of 32", 16, group_size=32),
    *(Trial(f"{bits} bits", bits=bits) for bits in (5, 6)),
]
KINDS = {
    "plain": "SVD of W",
    "power": "weighted by the inputs' power",
    "hessian": "whitened by the Hessian's Cholesky factor",
}
VARIANTS = [
    Trial(f"{title}{turns}", 16, weighting=kind, rounds=rounds)
    for kind, title in KINDS.items()
    for rounds, turns in ((0, ""), (1, ", 1 turn"), (3, ", 3 turns"))
]


@click.command()
@click.option("--captions", default=64, show_default=True, help="Of the evaluation list.")
@click.option("--eval-stride", default=6, show_default=True, help="Every how many steps.")
@click.option("--num-images", default=16, show_default=True, help="Calibration images.")
@click.option("--stride", default=6, show_default=True, help="Cached steps of each.")
@click.option("--work", help="Folder for calibration data.  [default: a temporary one]")
def main(captions: int, eval_stride: int, num_images: int, stride: int, work: str | None) -> None:
    """Measure ranks, groups and bits, then the ways to find the branch."""
    pipeline = load_pipeline("nano")
    texts = load_prompts(f"{pipeline.prompts}_evaluation")[:captions]
    steps = pipeline.defaults.num_steps
    with tempfile.TemporaryDirectory() as temporary:
        folder = generate_calibration_data(
            "nano", Path(work or temporary) / "c", num_images=num_images
        )
        cache = cache_adaround_data(folder, num_images=num_images, stride=stride)
        hessians = collected(pipeline, BlockCache.open(cache, pipeline))
    reference = reference_trajectories(pipeline, texts, num_steps=steps, stride=eval_stride)
    rows: dict[str, dict[str, Any]] = {}
    per_caption: dict[str, np.ndarray] = {}
    for trial in (*SIZES, *VARIANTS):
        rows[trial.name], per_caption[trial.name] = measured(
            pipeline.transformer, hessians, trial, reference
        )
        paired = per_caption[trial.name] - per_caption[BASE]
        rows[trial.name]["gain"] = [float(paired.mean()), *bootstrap_interval(paired)]
        click.echo(f"{trial.name}: {rows[trial.name]['db']:.2f} dB")
    data = {"machine": machine(), "results": rows}
    write_report("lowrank", "Low rank beside codes, on nano", data, report(rows))


def collected(pipeline: Pipeline, cache: BlockCache) -> dict[str, mx.array]:
    """XᵀX of every linear's input, by path."""
    hessians = {}
    for index, data in BlockWalk(cache, pipeline.transformer, BATCH):
        block = stand_in_block(pipeline.transformer, index)
        for path, found in input_statistics(block, data, BATCH).items():
            hessians[full_path(index, path)] = found.hessian
    return hessians


def measured(
    transformer: MMDiT, hessians: Mapping[str, mx.array], trial: Trial, reference: Reference
) -> tuple[dict[str, Any], np.ndarray]:
    """dB, bytes and seconds; and the dB of each caption."""
    start, rounded, size, floats = time.perf_counter(), {}, 0, 0
    for path, linear in block_linears(transformer).items():
        found = trial.round(linear.weight, hessians[path])
        rounded[path] = found.weight()
        size, floats = size + found.nbytes(trial.bits), floats + 2 * linear.weight.size
        mx.eval(rounded[path])
    seconds = time.perf_counter() - start
    with weights_in(transformer, rounded):
        values = teacher_forced_sqnr(transformer, reference).mean(axis=0)
    row = {"db": float(values.mean()), "bytes": size, "share_of_16_bit": size / floats}
    return {**row, "seconds": seconds}, values


@contextmanager
def weights_in(transformer: MMDiT, weights: Mapping[str, mx.array]) -> Iterator[None]:
    """These weights in the model's linears while the context lasts."""
    linears = block_linears(transformer)
    kept = {path: linear.weight for path, linear in linears.items()}
    try:
        for path, weight in weights.items():
            linears[path].weight = weight
        yield
    finally:
        for path, weight in kept.items():
            linears[path].weight = weight


def report(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "Teacher-forced SQNR of the guided velocity in dB, weights alone: 4 bits with one scale an "
        "output channel, unless a row says otherwise, GPTQ on what the branch leaves. Bytes are "
        "those of the block linears: packed codes, float32 scales, the branch in 16 bits. Gains "
        "with 95% bootstrap intervals over captions.",
        "",
        "## Bytes spent on rank, on groups, on bits",
        "",
        "| | dB | gain | kB | of 16 bits |",
        "|---|---|---|---|---|",
    ]
    for trial in SIZES:
        row = rows[trial.name]
        lines.append(
            f"| {trial.name} | {row['db']:.2f} | {told(row['gain'])} | {row['bytes'] / 1000:.0f} "
            f"| {row['share_of_16_bit']:.1%} |"
        )
    lines += ["", "## Where a branch of rank 16 comes from", "", "| | dB | gain | s |"]
    lines.append("|---|---|---|---|")
    for trial in VARIANTS:
        row = rows[trial.name]
        lines.append(
            f"| {trial.name} | {row['db']:.2f} | {told(row['gain'])} | {row['seconds']:.0f} |"
        )
    lines += [
        "",
        "A turn fits the branch anew to what GPTQ has left; the best of all is kept. Seconds are "
        "those of a machine that was shared with other work.",
    ]
    return lines


def told(gain: list[float]) -> str:
    return f"{gain[0]:+.2f} ({gain[1]:+.2f} to {gain[2]:+.2f})" if any(gain) else ""


if __name__ == "__main__":
    main()
