"""How collect_layer_activations replays images and folds what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..calibration import activations
from ..calibration.replay import Pair, transformer_inputs
from ..calibration.statistics import check_finite, collect
from ..calibration.trajectories import Trajectories
from ..models.pipeline import Pipeline
from ..store import Manifest

FOLDED = "folded"  # the unit of the files over all images


def sources(trajectories: Trajectories) -> dict[str, Any]:
    """What the statistics are made from."""
    return {
        "model": trajectories.made_from["model"],
        "model_hash": trajectories.made_from["model_hash"],
        "calibration_hash": trajectories.hash,
    }


def collect_image(
    folder: Path, trajectories: Trajectories, pipeline: Pipeline, pairs: list[Pair], batch: int
) -> list[str]:
    """Replays the steps of one image; the names of the files written."""
    names = []
    for start in range(0, len(pairs), batch):
        here = pairs[start : start + batch]
        inputs = transformer_inputs(trajectories, here, pipeline.dtype)
        found = collect(pipeline.transformer, inputs, len(here))
        for (image, step), sample in zip(here, found, strict=True):
            check_finite(sample, f"step {step} of image {image}")
            activations.save_sample(folder, image, step, sample)
            names.append(activations.sample_name(image, step))
    return names


def finish(
    folder: Path,
    manifest: Manifest,
    units: list[str],
    trajectories: Trajectories,
    pipeline: Pipeline,
    steps: list[int],
) -> None:
    """Folds the images, in their order, and writes what is about all of them."""
    manifest.merge_ranks()
    if not manifest.done(FOLDED):
        images = [int(unit) for unit in units]
        names = [name for step in steps for name in activations.fold_step(folder, images, step)]
        sigmas = {step: trajectories.sigmas[step] for step in steps}
        names.append(
            activations.write_statistics(
                folder, pipeline.transformer, sources(trajectories), sigmas, len(images)
            )
        )
        manifest.mark(FOLDED, names)
    manifest.finish([*units, FOLDED])
