"""Very many pictures of one model: in batches that ranks share and a killed run goes on with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click
import mlx.core as mx
import numpy as np

from ..cli import Bar
from ..distributed import Ranks, open_manifest
from ..errors import UserError
from ..evaluation.networks import Features, Network
from ..evaluation.statistics import Statistics
from ..inference.residual_setup import apply, load_prepared, prepare
from ..report.picture import write_picture
from ..store import Manifest, folder_lock, human_bytes, load_npz, require_space, save_npz
from .plan import Plan

FORMAT, VERSION = "ditq-samples", 1
SCALES = "residual_scales.json"
STATISTICS = "statistics.npz"
PATTERNS = ("pictures/*.png", "features/*.npz", SCALES, STATISTICS)
FEATURES = ("pooled", "spatial", "probabilities")


GoOn = Callable[[range], bool]  # whether the batch of these pictures is still to be drawn


def draw_all(plan: Plan, folder: Path, force: bool, go_on: GoOn | None = None) -> Path:
    """Fills the folder; goes on where an earlier run was stopped. Where `go_on` stops it, what is
    whole is kept for a later run."""
    ranks = Ranks.here()
    with folder_lock(folder, rank=ranks.store_rank):
        manifest = open_manifest(
            folder,
            ranks,
            format=FORMAT,
            version=VERSION,
            settings=plan.settings(),
            made_from=plan.subject.made_from,
            force=force,
            own_files=PATTERNS,
        )
        batches = {f"{batch.start:05d}": batch for batch in plan.batches()}
        todo = manifest.pending(batches)
        if ranks.rank == 0:
            announce(plan, folder, sum(len(batches[unit]) for unit in todo))
        quantize_inputs(plan, folder, ranks, manifest)
        mine = todo[ranks.rank :: ranks.size]
        with Bar("samples", len(mine) * plan.work.num_steps) as bar:
            for unit in mine:
                if go_on is not None and not go_on(batches[unit]):
                    break
                manifest.mark(unit, draw_batch(plan, folder, batches[unit], bar))
        ranks.barrier()
        if ranks.rank == 0:
            manifest.merge_ranks()
            if manifest.pending(batches):
                return folder
            units = [*batches, *([] if plan.options is None else ["scales"])]
            if plan.eyes is not None:
                gather(folder, plan.eyes, list(plan.batches())).save(folder / STATISTICS)
                manifest.mark("statistics", [STATISTICS])
                units.append("statistics")
            manifest.finish(units)
    return folder


def announce(plan: Plan, folder: Path, pictures: int) -> None:
    """Says what the work will take, and refuses it where the disk is too small."""
    needed = plan.nbytes(pictures)
    click.echo(
        f"{pictures} of {len(plan.prompts)} pictures to draw, {plan.work.num_steps} steps each: "
        f"about {human_bytes(needed)} in {folder}"
    )
    require_space(folder, needed, "the samples")


def quantize_inputs(plan: Plan, folder: Path, ranks: Ranks, manifest: Manifest) -> None:
    """Layers and scales, chosen once by rank 0 and read by all, then put around the model."""
    if plan.options is None:
        return
    subject, path = plan.subject, folder / SCALES
    if ranks.rank == 0 and manifest.pending(["scales"]):
        with Bar("scales", plan.work.num_steps) as bar:
            prepared = prepare(
                subject.pipeline, plan.options, plan.work, subject.level, click.echo, [bar]
            )
        prepared.save(path, subject.made_from)
        manifest.mark("scales", [SCALES])
    ranks.barrier()
    prepared = load_prepared(path, plan.options, plan.work, subject.made_from)
    apply(subject.pipeline, prepared, subject.level)


def draw_batch(plan: Plan, folder: Path, batch: range, bar: Bar) -> list[str]:
    """The names of the files that were written."""
    pipeline = plan.subject.pipeline
    latents = pipeline.sample(
        plan.prompts[batch.start : batch.stop],
        plan.seeds[batch.start : batch.stop],
        num_steps=plan.work.num_steps,
        cfg_weight=plan.work.cfg_weight,
        callbacks=[bar],
    )
    if not bool(mx.isfinite(latents).all()):
        raise UserError(
            f"a picture of {batch.start} to {batch.stop - 1} has values that are not finite; the "
            "model's weights or scales are unusable"
        )
    pictures, files = pipeline.decode(latents), []
    if plan.keep != "features":
        for index, picture in zip(batch, pictures, strict=True):
            name = f"pictures/{index:05d}.png"
            texts = {"prompt": plan.prompts[index], "seed": plan.seeds[index]}
            write_picture(folder / name, picture, **texts, model=pipeline.name)
            files.append(name)
    if plan.eyes is not None:
        name, found = features_name(batch), plan.eyes(pictures)
        kept = np.array(latents.astype(mx.float32))[: max(0, plan.keep_latents - batch.start)]
        arrays = {kind: getattr(found, kind) for kind in FEATURES}
        save_npz(folder / name, **arrays, **({"latents": kept} if len(kept) else {}))
        files.append(name)
    return files


def features_name(batch: range) -> str:
    return f"features/{batch.start:05d}.npz"


def gather(folder: Path, eyes: Network, batches: Sequence[range]) -> Statistics:
    """Of all pictures, in their order: the same whatever ranks there were."""
    statistics = Statistics(eyes.identity)
    for batch in batches:
        arrays = load_npz(folder / features_name(batch), only=FEATURES)
        names = [f"{index:05d}" for index in batch]
        statistics.add(Features(**{kind: arrays[kind] for kind in FEATURES}), names)
    return statistics


def kept_latents(folder: Path, batches: Sequence[range]) -> np.ndarray:
    """Of the first pictures, as `keep_latents` had them kept."""
    found = [load_npz(folder / features_name(batch), only=["latents"]) for batch in batches]
    return np.concatenate([arrays["latents"] for arrays in found if "latents" in arrays])
