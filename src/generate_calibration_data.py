"""Stage 1: samples pictures with the 16-bit model and keeps what entered every step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from .calibration import trajectories
from .cli import Bar, command, peak_memory_bytes
from .distributed import Ranks, open_manifest
from .errors import UserError
from .model_options import model_options
from .models.load import MODELS, Model, load_pipeline
from .models.pipeline import Pipeline
from .models.prompts import load_prompts
from .sampling import Noise, StepCallback, denoise, sd3_sigmas, uses_guidance
from .store import folder_lock, human_bytes, require_space, require_writable

IMAGES_AT_ONCE = 64  # whose texts are encoded together: some 10 MB each of Stable Diffusion 3's


@dataclass(frozen=True)
class Plan:
    """What decides every byte of the folder."""

    pipeline: Pipeline
    prompts: list[str]
    seeds: list[int]
    num_steps: int
    cfg_weight: float
    height: int
    width: int
    batch_size: int

    def settings(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "seeds": self.seeds,
            "num_images": len(self.prompts),
            "num_steps": self.num_steps,
            "cfg_weight": self.cfg_weight,
            "height": self.height,
            "width": self.width,
            "batch_size": self.batch_size,
            "schedule": {
                "name": "sd3",
                "shift": self.pipeline.defaults.shift,
                "sigmas": [float(s) for s in self.sigmas()],
            },
            "dtype": str(self.pipeline.dtype).removeprefix("mlx.core."),
            **self.pipeline.encode_text.settings(),
        }

    def sigmas(self) -> np.ndarray:
        return sd3_sigmas(self.num_steps, self.pipeline.defaults.shift)

    def check(self) -> None:
        """Raises for what would fail later, after long work."""
        self.pipeline.latent_shape(self.height, self.width)
        self.sigmas()
        Noise([self.seeds[0], self.seeds[-1]])
        uses_guidance(self.cfg_weight)
        self.pipeline.check(self.prompts)

    def batches(self) -> list[list[int]]:
        """Image numbers, cut the same way whatever is done already: a batch rounds as a whole."""
        images = range(len(self.prompts))
        return [list(images[i : i + self.batch_size]) for i in images[:: self.batch_size]]


def generate_calibration_data(
    model: Model = "nano",
    calib_dir: str | Path = "calibration_data",
    *,
    num_images: int | None = None,
    num_steps: int | None = None,
    cfg_weight: float | None = None,
    prompts: str | Path | None = None,
    seed: int = 0,
    batch_size: int = 4,
    height: int | None = None,
    width: int | None = None,
    force: bool = False,
) -> Path:
    """Fills `calib_dir` and gives its path; goes on where an earlier run was stopped."""
    folder, ranks = Path(calib_dir), Ranks.here()
    require_writable(folder)
    plan = make_plan(
        load_pipeline(model),
        prompts,
        num_images=num_images,
        num_steps=num_steps,
        cfg_weight=cfg_weight,
        seed=seed,
        batch_size=batch_size,
        height=height,
        width=width,
    )
    with folder_lock(folder, rank=ranks.store_rank):
        manifest = open_manifest(
            folder,
            ranks,
            format=trajectories.FORMAT,
            version=trajectories.VERSION,
            settings=plan.settings(),
            made_from={"model": plan.pipeline.name, "model_hash": plan.pipeline.hash},
            force=force,
            own_files=trajectories.PATTERNS,
        )
        units = [f"{image:04d}" for image in range(len(plan.prompts))]
        todo = [b for b in plan.batches() if manifest.pending(units[b[0] : b[-1] + 1])]
        if ranks.rank == 0:
            announce(folder, plan, sum(map(len, todo)))
        mine = todo[ranks.rank :: ranks.size]
        with Bar("calibration", len(mine) * plan.num_steps) as bar:
            for batch in with_text(folder, plan, mine):
                make_batch(folder, plan, batch, bar)
                for image in batch:
                    manifest.mark(units[image], trajectories.image_files(image, plan.num_steps))
        ranks.barrier()
        if ranks.rank == 0:
            manifest.finish(units)
    return folder


def make_plan(
    pipeline: Pipeline,
    prompts: str | Path | None,
    *,
    num_images: int | None,
    seed: int,
    batch_size: int,
    **chosen: Any,
) -> Plan:
    """Takes the model's defaults for what is not chosen, and refuses what cannot be."""
    count = pipeline.defaults.calibration_images if num_images is None else num_images
    for name, value in (("num-images", count), ("batch-size", batch_size)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    lines = load_prompts(prompts or pipeline.prompts)
    for name, value in chosen.items():
        chosen[name] = getattr(pipeline.defaults, name) if value is None else value
    plan = Plan(
        pipeline=pipeline,
        prompts=[lines[i % len(lines)] for i in range(count)],
        seeds=[seed + i for i in range(count)],
        batch_size=batch_size,
        **chosen,
    )
    plan.check()
    return plan


def announce(folder: Path, plan: Plan, images: int) -> None:
    """Says what the work will take, and refuses it where the disk is too small."""
    needed = images * trajectories.image_bytes(
        plan.pipeline.latent_shape(plan.height, plan.width),
        plan.num_steps,
        conditioning_bytes(plan),
        plan.height * plan.width,
    )
    click.echo(
        f"{images} of {len(plan.prompts)} images to make, {plan.num_steps} steps each: "
        f"about {human_bytes(needed)} in {folder}"
    )
    require_space(folder, needed, "the calibration data")


def conditioning_bytes(plan: Plan) -> int:
    """Of one image, as it is stored; no text is read for it."""
    pipeline, rows = plan.pipeline, 2 if uses_guidance(plan.cfg_weight) else 1
    config, tokens = pipeline.transformer.config, pipeline.encode_text.tokens()
    size = trajectories.stored_dtype(pipeline.dtype).size
    return rows * size * (tokens * config.text_dim + config.pooled_dim)


def with_text(folder: Path, plan: Plan, batches: Sequence[list[int]]) -> Iterator[list[int]]:
    """The batches, each once the conditioning of its images is written.

    That of many is made together: a text encoder may be larger than all else, and is read once for
    them, before the transformer's weights are.
    """
    together = max(1, IMAGES_AT_ONCE // plan.batch_size)
    for start in range(0, len(batches), together):
        chosen = batches[start : start + together]
        prompts = [[plan.prompts[image] for image in batch] for batch in chosen]
        found = plan.pipeline.condition_each(prompts, plan.cfg_weight)
        for batch in chosen:
            trajectories.save_conditioning(folder, batch, found.pop(0))
        yield from chosen


def make_batch(folder: Path, plan: Plan, images: list[int], bar: StepCallback) -> None:
    """Samples some images together, whose conditioning is there, and writes their other files."""
    pipeline = plan.pipeline
    conditioning = trajectories.load_conditioning(folder, images, pipeline.dtype)
    latents = denoise(
        pipeline.velocity(conditioning, plan.cfg_weight),
        Noise([plan.seeds[image] for image in images]),
        plan.sigmas(),
        pipeline.latent_shape(plan.height, plan.width),
        callbacks=[trajectories.TrajectoryWriter(folder, images), bar],
    )
    trajectories.save_results(folder, images, latents, pipeline.decode(latents))


@command()
@model_options("nano", f"Name ({', '.join(MODELS)}) or a pipeline's folder.", encodes=True)
@click.option("--calib-dir", default="calibration_data", help="Folder to fill.")
@click.option("--num-images", type=int, help="Images to sample.  [default: 50; nano: 16]")
@click.option("--num-steps", type=int, help="Steps of each.  [default: 50; nano: 30]")
@click.option("--cfg-weight", type=float, help="Guidance.  [default: 7.5; nano: 4]")
@click.option("--prompts", help="File with one prompt a line.  [default: the model's own list]")
@click.option("--seed", default=0, help="Of the first image; the next ones count up.")
@click.option("--batch-size", default=4, help="Images sampled together.")
@click.option("--height", type=int, help="In pixels.  [default: 1024; nano: 128]")
@click.option("--width", type=int, help="In pixels.  [default: 1024; nano: 128]")
@click.option(
    "--force", is_flag=True, help="Start afresh in a folder that holds other work.  [off]"
)
def main(calib_dir: str, **settings: Any) -> None:
    """Stage 1: sample pictures with the 16-bit model and keep what entered every step.

    \b
    Example:
      python -m src.generate_calibration_data --num-images 16
    """
    start = time.perf_counter()
    folder = generate_calibration_data(calib_dir=calib_dir, **settings)
    seconds, peak = time.perf_counter() - start, human_bytes(peak_memory_bytes())
    click.echo(f"calibration data is in {folder}, {seconds:.1f} s, peak {peak}")


if __name__ == "__main__":
    main()
