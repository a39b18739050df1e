"""The weight track at SD3-medium's full size, on synthetic weights with outlier channels.

    python -m tools.bench_sd3_weights
    mlx.launch -n 4 -- python -m tools.bench_sd3_weights --name sd3_weights_4

Every block is rounded by the stage's own code from what random tokens of a 512² picture make of
it; ranks share the blocks as the stage does. Beside it runs the same loop written plainly in
PyTorch, eager and compiled, on the same block and data (`--no-torch` leaves it out). Needs no
checkpoint; meant for a GPU. Writes docs/benchmarks/NAME.json and NAME.md.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from src.cuda import launch_singly
from src.distributed import Ranks
from src.models.configs import config_named
from src.models.mmdit import MMDiT
from src.models.paths import BLOCKS
from src.models.pipeline import compiling_is_faster
from src.quant.block_rounding import RoundingSettings, ladder, round_block, with_seed
from src.quant.learning import Learning, Steps, learn_rounding
from src.quant.observe import input_statistics
from src.quant.rounding import RectifiedSigmoid
from src.quant.standin import BlockData, StandInBlock
from src.store import human_bytes
from src.weight_track.blocks import run_block, stand_in_block
from src.weight_track.plan import RATES, WEIGHT_COPIES, iterations_at_once, values_per_row

import click
import mlx.core as mx
import numpy as np

from tools.bench_common import machine, write_report

OUTLIERS = 8  # channels of every block's streams that are this many times as wide
OUTLIER_FACTOR = 20.0


@click.command()
@click.option("--model", default="sd3-medium", show_default=True)
@click.option("--tokens", default=1024, show_default=True, help="Of the picture.")
@click.option("--text-tokens", default=154, show_default=True)
@click.option("--rows", default=64, show_default=True, help="Samples, the negatives' included.")
@click.option("--iters", default=1000, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--blocks", default=24, show_default=True)
@click.option("--torch/--no-torch", default=True, show_default=True)
@click.option("--torch-iters", default=300, show_default=True)
@click.option("--name", default="sd3_weights", show_default=True, help="Of the report.")
def main(model: str, blocks: int, torch: bool, torch_iters: int, name: str, **options: Any) -> None:
    """Measure the rounding of a full-size model."""
    launch_singly()
    ranks = Ranks.here()
    ranks.barrier()
    start = time.perf_counter()
    mx.random.seed(0)
    transformer = MMDiT(config_named(model))  # its weights are drawn when they are first used
    settings = RoundingSettings(
        method="adaround",
        learning=Learning(
            iters=options["iters"], batch_size=options["batch_size"], lr=RATES["adaround"]
        ),
    )
    steps, found = Steps(compiled=compiling_is_faster()), []
    for index in range(ranks.rank, min(blocks, transformer.config.depth), ranks.size):
        found.append(rounded(transformer, index, settings, steps, options))
        click.echo(f"rank {ranks.rank}: {line(found[-1])}")
    ranks.barrier()
    data = {"machine": machine(), "ranks": ranks.size, "blocks": found, "options": options}
    data["seconds"] = time.perf_counter() - start
    data["estimated_bytes"] = estimate(transformer, options)
    if torch:
        data["torch"] = beside_torch(transformer, settings, options, torch_iters)
    if ranks.rank == 0:
        write_report(name, f"Rounding {model} at full size", data, report(data))


def synthetic_data(transformer: MMDiT, index: int, options: dict[str, Any]) -> BlockData:
    """Tokens in float16, some channels of each stream far wider, and what the block makes of it."""
    rng, hidden = np.random.default_rng(index), transformer.config.hidden
    key = mx.random.key(index)
    rows, wide = options["rows"], np.ones(hidden, dtype=np.float32)
    wide[rng.choice(hidden, OUTLIERS, replace=False)] = OUTLIER_FACTOR
    drawn = [
        (mx.random.normal((rows, *shape, hidden), key=own) * mx.array(wide)).astype(mx.float16)
        for own, shape in zip(
            mx.random.split(key, 3), ((options["tokens"],), (options["text_tokens"],), ()),
            strict=True,
        )
    ]  # fmt: skip
    drawn[2] = (0.2 * drawn[2]).astype(mx.float16)
    block = transformer[BLOCKS][index]
    block.apply(lambda p: p.astype(mx.float16))
    image, text = run_block(block, *drawn, options["batch_size"])
    step = mx.array(np.arange(rows) // 2 % 10)
    return BlockData(*drawn, step, image, text)


def rounded(
    transformer: MMDiT,
    index: int,
    settings: RoundingSettings,
    steps: Steps,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Rounds one block as the stage does: error of every rung, seconds and peak memory."""
    start = time.perf_counter()
    mx.reset_peak_memory()
    data = synthetic_data(transformer, index, options)
    block = stand_in_block(transformer, index)
    result = round_block(block, data, with_seed(settings, index), None, 10, steps)
    return {
        "block": index,
        "error_db": result.error_db,
        "kept": result.kept,
        "undecided": result.undecided,
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": mx.get_peak_memory(),
    }


def line(own: dict[str, Any]) -> str:
    rungs = ", ".join(f"{name} {db:.1f}" for name, db in own["error_db"].items())
    return (
        f"block {own['block']}: {rungs} dB, kept {own['kept']}, {own['seconds']:.1f} s, "
        f"peak {human_bytes(own['peak_memory_bytes'])}"
    )


def estimate(transformer: MMDiT, options: dict[str, Any]) -> int:
    """What the stage would announce for this data, see weight_track.plan."""
    config = transformer.config
    tokens = options["tokens"] + options["text_tokens"]
    weights = sum(s.weight.size for s in stand_in_block(transformer, 0).stand_ins.values())
    data = 2 * 2 * options["rows"] * tokens * config.hidden
    minibatch = options["batch_size"] * values_per_row(config, tokens)
    return data + 4 * iterations_at_once() * (WEIGHT_COPIES * weights + minibatch)


def beside_torch(
    transformer: MMDiT, settings: RoundingSettings, options: dict[str, Any], iters: int
) -> dict[str, Any]:
    """Seconds an iteration, ours and PyTorch's, from the same codes and on the same rows."""
    from tools.torch_rounding import torch_seconds  # PyTorch is needed by this figure alone

    data = synthetic_data(transformer, 0, options).rows(slice(0, options["batch_size"]))
    block = stand_in_block(transformer, 0)
    statistics_of = input_statistics(block, data, options["batch_size"])
    start = ladder(block, data, settings, statistics_of)["grid"]
    ours = our_seconds(block, data, start, settings, iters)
    mx.clear_cache()
    theirs = torch_seconds(transformer.config, block, data, start.codes, start.scales, iters)
    return {"ours": ours, **theirs}


def our_seconds(
    block: StandInBlock, data: BlockData, start: Any, settings: RoundingSettings, iters: int
) -> float:
    """Median over rounds of the seconds of one iteration, activations left alone."""
    steps, taken = Steps(compiled=compiling_is_faster()), []
    for _ in range(4):
        began = time.perf_counter()
        learning = Learning(iters=iters, batch_size=len(data), lr=settings.learning.lr)
        method = RectifiedSigmoid(settings.bits)
        learn_rounding(block, data, start.codes, start.scales, method, learning, steps=steps)
        taken.append((time.perf_counter() - began) / iters)
    return statistics.median(taken[1:])  # the first one compiles


def report(data: dict[str, Any]) -> list[str]:
    blocks, options = data["blocks"], data["options"]
    peak = max(own["peak_memory_bytes"] for own in blocks)
    lines = [
        f"{options['tokens']} image and {options['text_tokens']} text tokens, {options['rows']} "
        f"rows, batch {options['batch_size']}, {options['iters']} iterations a block of AdaRound "
        "from GPTQ; all with statistics, GPTQ, measurement of every rung and compilation.",
        "",
        "| | |",
        "|---|---|",
        f"| processes, one GPU each | {data['ranks']} |",
        f"| blocks of this process | {len(blocks)} |",
        f"| seconds in all | {data['seconds']:.0f} |",
        f"| seconds a block, median | {statistics.median(b['seconds'] for b in blocks):.1f} |",
        f"| peak memory | {human_bytes(peak)} |",
        f"| estimate announced | {human_bytes(data['estimated_bytes'])} |",
        "",
        "| block | " + " | ".join(blocks[0]["error_db"]) + " | kept |",
        "|---" * (len(blocks[0]["error_db"]) + 2) + "|",
    ]
    for own in blocks:
        rungs = " | ".join(f"{db:.1f}" for db in own["error_db"].values())
        lines.append(f"| {own['block']} | {rungs} | {own['kept']} |")
    if "torch" in data:
        lines += ["", *torch_lines(data["torch"])]
    return lines


def torch_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        "One iteration on the same block and rows, TF32 products in both, in one run:",
        "",
        "| | ms | ours is faster by |",
        "|---|---|---|",
        f"| ours | {1000 * found['ours']:.1f} | |",
    ]
    for name in ("eager", "compiled"):
        ratio = found[name] / found["ours"]
        lines.append(
            f"| PyTorch {found['version']}, {name} | {1000 * found[name]:.1f} | {ratio:.2f} |"
        )
    lines += [
        "",
        f"First loss: ours differs from PyTorch's by {found['loss_difference']:.1e}, relative.",
    ]
    return lines


if __name__ == "__main__":
    main()
