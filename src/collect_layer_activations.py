"""Activation track, first stage: what goes into every linear, step by step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from .activation_track.collection import collect_image, finish, sources
from .calibration import activations
from .calibration.replay import Pair, strided_pairs
from .calibration.statistics import Collector
from .calibration.trajectories import Trajectories, open_with_pipeline
from .cli import command, peak_memory_bytes
from .distributed import Ranks, open_manifest
from .errors import UserError
from .model_options import model_options
from .models.load import Model
from .models.pipeline import Pipeline
from .quant.schedule import Schedule
from .store import folder_lock, human_bytes, require_space, require_writable


def collect_layer_activations(
    calib_dir: str | Path = "calibration_data",
    *,
    model: Model | None = None,
    num_images: int = 5,
    stride: int = 2,
    batch_size: int = 4,
    force: bool = False,
) -> Path:
    """Fills `calib_dir`/activations and gives its path; goes on where an earlier run stopped."""
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {batch_size}")
    trajectories, pipeline = open_with_pipeline(calib_dir, model)
    strided = strided_pairs(trajectories, num_images, stride)
    pairs = covering(trajectories, strided)
    steps = sorted({step for _, step in pairs})
    folder, ranks = trajectories.folder / "activations", Ranks.here()
    require_writable(folder)
    settings = {"num_images": num_images, "stride": stride, "batch_size": batch_size}
    if len(pairs) > len(strided):
        settings["last_step"] = steps[-1]
    with folder_lock(folder, rank=ranks.store_rank):
        manifest = open_manifest(
            folder,
            ranks,
            format=activations.FORMAT,
            version=activations.VERSION,
            settings=settings,
            made_from=sources(trajectories),
            force=force,
            own_files=activations.PATTERNS,
        )
        units = [f"{image:04d}" for image in range(num_images)]
        todo = manifest.pending(units)
        if ranks.rank == 0:
            announce(folder, pipeline, len(todo), len(steps), num_images)
        mine, collector = todo[ranks.rank :: ranks.size], Collector(pipeline.transformer)
        for unit in tqdm(mine, desc="activations", unit="image", disable=not mine):
            own = [pair for pair in pairs if pair[0] == int(unit)]
            names = collect_image(folder, trajectories, pipeline, collector, own, batch_size)
            manifest.mark(unit, names)
        ranks.barrier()
        if ranks.rank == 0:
            finish(folder, manifest, units, trajectories, pipeline, steps)
    return folder


def covering(trajectories: Trajectories, pairs: Sequence[Pair]) -> list[Pair]:
    """And each image's last step, where its noise level would lie outside of what is calibrated:
    then not even the trajectories' own schedule could be drawn."""
    sigmas = [float(sigma) for sigma in trajectories.sigmas[: trajectories.num_steps]]
    steps = sorted({step for _, step in pairs})
    if Schedule(tuple(sigmas[step] for step in steps)).covers(sigmas[-1]):
        return list(pairs)
    return sorted({*pairs, *((image, len(sigmas) - 1) for image, _ in pairs)})


def announce(folder: Path, pipeline: Pipeline, todo: int, steps: int, images: int) -> None:
    """Says what the work will take, and refuses it where the disk is too small."""
    one = activations.sample_bytes(pipeline.transformer) * steps
    needed = (todo + 1) * one  # and once more for the statistics over all images
    click.echo(
        f"{todo} of {images} images to replay, {steps} steps each: "
        f"about {human_bytes(needed)} in {folder}"
    )
    require_space(folder, needed, "the activation statistics")


@command()
@click.option("--calib-dir", default="calibration_data", help="Folder of stage 1.")
@model_options(help="Name or folder.  [default: the model that made the folder]")
@click.option("--num-images", default=5, help="Images to replay.")
@click.option("--stride", default=2, help="Every which step; and the last, where it lies apart.")
@click.option("--batch-size", default=4, help="Steps replayed together.")
@click.option(
    "--force", is_flag=True, help="Start afresh in a folder that holds other work.  [off]"
)
def main(**settings: Any) -> None:
    """Activation track: record what goes into every linear, step by step.

    \b
    Example:
      python -m src.collect_layer_activations --num-images 5 --stride 2
    """
    start = time.perf_counter()
    folder = collect_layer_activations(**settings)
    seconds, peak = time.perf_counter() - start, human_bytes(peak_memory_bytes())
    click.echo(f"activation statistics are in {folder}, {seconds:.1f} s, peak {peak}")


if __name__ == "__main__":
    main()
