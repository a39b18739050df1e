"""Rounds block after block, writes each as it is finished, and tells of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from tqdm import tqdm

from .. import __version__
from ..cli import peak_memory_bytes
from ..distributed import Ranks, open_manifest
from ..errors import UserError
from ..models.pipeline import compiling_is_faster
from ..quant.artifacts import (
    OUTPUT_FORMAT,
    OUTPUT_VERSION,
    block_file,
    load_rounded_block,
    save_rounded_block,
)
from ..quant.block_rounding import LADDER, RoundedBlock, round_block, with_seed
from ..quant.learning import Steps
from ..quant.standin import BlockData
from ..store import (
    Manifest,
    folder_lock,
    human_bytes,
    read_json,
    require_space,
    require_writable,
    write_json,
)
from .blocks import (
    BlockWalk,
    activation_grids,
    own_biases,
    put_rounded,
    rounded_layers,
    stand_in_block,
)
from .plan import Plan, disk_bytes, require_memory
from .refine import refine_network, refined_line, write_refined

CLOCK_FORMAT = "ditq-adaround-clock"
REFINE_UNIT = "refine"


def round_all(plan: Plan, force: bool = False) -> None:
    """Fills the plan's folder; what is there already stays."""
    ranks = Ranks.here()
    if ranks.size > 1 and plan.options.prefix == "quantized":
        raise UserError(
            "--prefix quantized cannot be shared among processes: every block waits for the one "
            "before it; use --prefix fp, or one process"
        )
    if plan.refines and plan.options.batch_size % ranks.size:
        raise UserError(
            f"--batch-size {plan.options.batch_size} cannot be shared among {ranks.size} processes "
            f"for refining; give a multiple of {ranks.size}, or --refine 0"
        )
    require_writable(plan.folder)
    needed = require_memory(plan, ranks.size)
    with folder_lock(plan.folder, rank=ranks.store_rank):
        manifest = open_manifest(
            plan.folder,
            ranks,
            format=OUTPUT_FORMAT,
            version=OUTPUT_VERSION,
            settings=plan.settings(),
            made_from=plan.made_from(),
            force=force,
            own_files=["weights/mm*", "blocks/mm*", "clock/mm*"],
        )
        units = [unit_name(index) for index in plan.blocks]
        refining = plan.refines and plan.whole and not manifest.done(REFINE_UNIT)
        if ranks.rank == 0:
            announce(plan, len(manifest.pending(units)), needed)
        work_through(plan, manifest, ranks)
        ranks.barrier()
        if refining:
            refined = refine_network(plan, ranks)
        if ranks.rank == 0:
            manifest.merge_ranks()
            if refining:
                manifest.mark(REFINE_UNIT, write_refined(plan, refined), refined.figures())
            conclude(plan, manifest, units)


def conclude(plan: Plan, manifest: Manifest, units: list[str]) -> None:
    """config.json, the finished manifest, and the closing table."""
    figures = {index: manifest.info(unit_name(index)) for index in plan.blocks}
    refined = None
    if plan.refines and plan.whole:
        units, refined = [*units, REFINE_UNIT], manifest.info(REFINE_UNIT)
    write_config(plan, figures, refined)
    manifest.finish(units)
    click.echo(ladder_table(figures))
    if refined is not None:
        click.echo(refined_line(refined))
    elif plan.refines:
        click.echo("refining waits until all blocks are rounded: run again without --blocks")


def unit_name(index: int) -> str:
    return f"mm{index}"


def clock_file(folder: Path, index: int) -> Path:
    """Seconds and memory of a block: no two runs agree on them, so they are in no manifest."""
    return folder / "clock" / f"mm{index}.json"


def announce(plan: Plan, pending: int, memory: int) -> None:
    """Says what the work will take, and refuses it where the disk is too small."""
    disk = disk_bytes(plan)
    require_space(plan.folder, disk, "the rounded weights")
    click.echo(
        f"{pending} of {len(plan.blocks)} blocks to round from {len(plan.cache.pairs)} samples: "
        f"about {human_bytes(memory)} of memory, {human_bytes(disk)} in {plan.folder}"
    )


def work_through(plan: Plan, manifest: Manifest, ranks: Ranks) -> None:
    """Rounds this rank's blocks, in order."""
    quantized = plan.options.prefix == "quantized"
    walk = BlockWalk(plan.cache, plan.pipeline.transformer, plan.options.batch_size, quantized)
    mine = [index for index in plan.blocks if index % ranks.size == ranks.rank]
    todo = {index for index in mine if not manifest.done(unit_name(index))}
    if not todo:
        return
    walk.wanted = todo
    steps = Steps(compiled=compiling_is_faster())
    with tqdm(total=len(todo), desc="rounding", unit="block") as bar:
        for index, data in walk:
            if index in todo:
                start = time.perf_counter()
                mx.reset_peak_memory()
                rounded = round_one(plan, index, data, steps)
                clock = {
                    "seconds": round(time.perf_counter() - start, 2),
                    "peak_memory_bytes": peak_memory_bytes(),
                }
                write_json(
                    clock_file(plan.folder, index),
                    {"format": CLOCK_FORMAT, "version": OUTPUT_VERSION, **clock},
                )
                manifest.mark(unit_name(index), [block_file(index, plan.part)], figures_of(rounded))
                tqdm.write(block_line(index, figures_of(rounded), clock))
                bar.update()
            if bar.n == len(todo):
                break
            if quantized:
                walk.leave(rounded_before(plan, index), data)


def round_one(plan: Plan, index: int, data: BlockData, steps: Steps) -> RoundedBlock:
    """Rounds one block and writes it."""
    block = stand_in_block(plan.pipeline.transformer, index, plan.config)
    grids = None
    if plan.config is not None:
        grids = activation_grids(plan.config, index, list(block.stand_ins), plan.cache.sigmas)
    settings = with_seed(plan.options.rounding(), plan.options.seed + index)
    rounded = round_block(block, data, settings, grids, len(plan.cache.step_keys), steps)
    layers = rounded_layers(index, block, rounded, own_biases(plan.pipeline.transformer, index))
    save_rounded_block(plan.folder, index, layers, plan.part)
    return rounded


def rounded_before(plan: Plan, index: int) -> Any:
    """The block as later blocks meet it: rounded, or as it is where it is not to be rounded."""
    if index not in plan.blocks:
        return plan.pipeline.transformer.multimodal_transformer_blocks[index]
    block = stand_in_block(plan.pipeline.transformer, index, plan.config)
    layers = load_rounded_block(plan.folder, index, plan.part)
    put_rounded(block, index, layers, own_biases(plan.pipeline.transformer, index))
    return block.module


def figures_of(rounded: RoundedBlock) -> dict[str, Any]:
    """What is reported of a block, the same in every run."""
    return {
        "error_db": {name: round(value, 3) for name, value in rounded.error_db.items()},
        "kept": rounded.kept,
        "bias_corrected": bool(rounded.corrections),
        "not_nearest": round(rounded.moved, 5),
        "undecided": round(rounded.undecided, 5),
    }


def block_line(index: int, figures: dict[str, Any], clock: dict[str, Any]) -> str:
    rungs = ", ".join(f"{name} {db:.1f}" for name, db in figures["error_db"].items())
    asked = list(figures["error_db"])[-1]
    kept = figures["kept"]
    verdict = f"kept {kept}" if kept == asked else f"{asked} is not better, kept {kept}"
    return (
        f"block {index}: {rungs} dB; {verdict}; {figures['not_nearest']:.1%} of codes not the "
        f"nearest; {clock['seconds']:.1f} s, peak {human_bytes(clock['peak_memory_bytes'])}"
    )


def write_config(
    plan: Plan, figures: dict[int, dict[str, Any]], refined: dict[str, Any] | None
) -> None:
    """config.json: settings, versions, sources, every block's figures and those of refining."""
    clocks = {}
    for index in figures:
        path = clock_file(plan.folder, index)
        if path.exists():
            clock = read_json(path, CLOCK_FORMAT, OUTPUT_VERSION)
            clocks[str(index)] = {k: clock[k] for k in ("seconds", "peak_memory_bytes")}
    write_json(
        plan.folder / "config.json",
        {
            "format": OUTPUT_FORMAT,
            "version": OUTPUT_VERSION,
            "made_from": plan.made_from(),
            "settings": plan.settings(),
            "versions": {"ditq": __version__, "mlx": mx.__version__},
            "step_keys": plan.cache.step_keys,
            "sigmas": plan.cache.sigmas,
            "blocks": {str(index): own for index, own in figures.items()},
            "refined": refined,
            "clock": clocks,
        },
    )


def ladder_table(figures: dict[int, dict[str, Any]]) -> str:
    """Mean over the blocks of every rung's output error."""
    rungs: dict[str, list[float]] = {}
    for own in figures.values():
        for name, value in own["error_db"].items():
            rungs.setdefault(name, []).append(value)
    order = sorted(rungs, key=lambda name: (*LADDER, name).index(name))
    lines = ["block output, signal to error, mean over blocks:"]
    lines += [f"  {name:<9} {sum(rungs[name]) / len(rungs[name]):6.2f} dB" for name in order]
    return "\n".join(lines)
