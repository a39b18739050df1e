"""Weight track, second half: rounds the weights of every block against its cached outputs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from .cli import command, peak_memory_bytes
from .cuda import launch_singly
from .model_options import model_options
from .models.load import MODELS, Model
from .quant.block_rounding import METHODS
from .quant.grid import GROUP_SIZES
from .store import human_bytes
from .weight_track.plan import PREFIXES, REFINE, REFINED_BY_DEFAULT, Options, make_plan
from .weight_track.work import round_all

DEFAULTS = Options()


def adaround_optimize(
    cache_dir: str | Path = "calibration_data/adaround_cache",
    output_dir: str | Path = "adaround_output",
    *,
    model: Model | None = None,
    force: bool = False,
    **options: Any,
) -> Path:
    """Fills `output_dir` and gives its path; goes on where an earlier run was stopped.

    `options` are the fields of `weight_track.plan.Options`, named as on the command line.
    """
    launch_singly()
    plan = make_plan(Path(cache_dir), Path(output_dir), model, Options(**options))
    round_all(plan, force)
    return plan.folder


@command()
@click.option("--cache-dir", default="calibration_data/adaround_cache", help="The block cache.")
@click.option("--output-dir", default="adaround_output", help="Folder to fill.")
@model_options(help=f"{', '.join(MODELS)} or a folder.  [default: the cache's]")
@click.option("--bits-w", default=DEFAULTS.bits_w, help="Bits of a weight, 2 to 8.")
@click.option("--bits-a", default=DEFAULTS.bits_a, help="Bits of an activation, 2 to 8.")
@click.option("--iters", default=DEFAULTS.iters, help="Iterations of learned rounding a block.")
@click.option("--method", default=DEFAULTS.method, help=f"One of {', '.join(METHODS)}.")
@click.option(
    "--group-size",
    default=DEFAULTS.group_size,
    help=f"Weights to a scale: {', '.join(map(str, GROUP_SIZES))}; 0 is one per output channel.",
)
@click.option("--batch-size", default=DEFAULTS.batch_size, help="Rows of a minibatch.")
@click.option("--lr", type=float, help="Rate of Adam.  [default: adaround 0.1; ste 0.002]")
@click.option("--warmup", default=DEFAULTS.warmup, help="Share of adaround without regulariser.")
@click.option(
    "--b-range", default=DEFAULTS.b_range, type=(float, float), help="adaround's exponent, falling."
)
@click.option("--reg", default=DEFAULTS.reg, help="Weight of adaround's regulariser.")
@click.option(
    "--activations-from",
    default=DEFAULTS.activations_from,
    help="Share of the run after which half of the activations are quantized; 1: never.",
)
@click.option(
    "--bias-correction/--no-bias-correction",
    default=DEFAULTS.bias_correction,
    help="Move biases by what rounding has moved in the mean, where that helps.",
)
@click.option(
    "--refine",
    type=int,
    help="Iterations over the whole network, when its blocks are rounded.  "
    f"[default: {REFINE} where it has up to {REFINED_BY_DEFAULT // 10**6} M weights, else 0]",
)
@click.option(
    "--calib-dir", help="What refining noises afresh.  [default: the folder above the cache]"
)
@click.option(
    "--prefix",
    default=DEFAULTS.prefix,
    help=f"What enters a block, of the 16-bit model or the rounded blocks: {', '.join(PREFIXES)}.",
)
@click.option("--blocks", help="Such as 0-3,7.  [default: all]")
@click.option(
    "--quant-config", help="The activation track's file, whose smoothing is folded in.  [none]"
)
@click.option("--seed", default=DEFAULTS.seed, help="Of minibatches and dropped elements.")
@click.option(
    "--force", is_flag=True, help="Start afresh in a folder that holds other work.  [off]"
)
def main(cache_dir: str, output_dir: str, **settings: Any) -> None:
    """Weight track: round the weights of every block against its cached outputs.

    \b
    Example:
      python -m src.adaround_optimize --bits-w 4 --iters 1000
    """
    start = time.perf_counter()
    folder = adaround_optimize(cache_dir, output_dir, **settings)
    seconds, peak = time.perf_counter() - start, human_bytes(peak_memory_bytes())
    click.echo(f"rounded weights are in {folder}, {seconds:.1f} s, peak {peak}")


if __name__ == "__main__":
    main()
