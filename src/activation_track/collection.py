"""How collect_layer_activations replays images and folds what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..calibration import activations
from ..calibration.replay import Pair, transformer_inputs
from ..calibration.statistics import Collector, check_finite
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
    folder: Path,
    trajectories: Trajectories,
    pipeline: Pipeline,
    collector: Collector,
    pairs: list[Pair],
    batch: int,
) -> list[str]:
    """Replays the steps of one image; the names of the files written."""
    batches = [pairs[start : start + batch] for start in range(0, len(pairs), batch)]
    inputs = ((transformer_inputs(trajectories, b, pipeline.dtype), len(b)) for b in batches)
    names = []
    for here, found in zip(batches, collector.collected(inputs), strict=True):
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
