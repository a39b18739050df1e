"""Weight track, first half: replays stored steps and keeps what enters and leaves every block."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from tqdm import tqdm

from .calibration import block_cache
from .calibration.capture import captured_blocks
from .calibration.replay import Pair, strided_pairs, transformer_inputs
from .calibration.trajectories import Trajectories, sample_name
from .cli import command, peak_memory_bytes
from .distributed import Ranks, open_manifest
from .errors import UserError
from .model_options import model_options
from .models.load import MODELS, Model, chosen, load_pipeline
from .models.pipeline import Pipeline
from .sampling import uses_guidance
from .store import (
    folder_lock,
    free_bytes,
    human_bytes,
    require_writable,
)

METADATA_UNIT = "metadata"


@dataclass(frozen=True)
class Plan:
    """What decides every byte of the cache."""

    pipeline: Pipeline
    trajectories: Trajectories
    pairs: list[Pair]
    stride: int
    batch_size: int
    entry_only: bool

    def settings(self) -> dict[str, Any]:
        return {
            "num_images": len({image for image, _ in self.pairs}),
            "stride": self.stride,
            "batch_size": self.batch_size,
            "entry_only": self.entry_only,
            "dtype": str(self.pipeline.dtype).removeprefix("mlx.core."),
        }

    def made_from(self) -> dict[str, Any]:
        return {
            "model": self.pipeline.name,
            "model_hash": self.pipeline.hash,
            "calibration_hash": self.trajectories.hash,
        }

    @property
    def rows(self) -> int:
        """Of one sample: the prompt's and, under guidance, the negative's."""
        return 2 if uses_guidance(self.trajectories.cfg_weight) else 1

    def batches(self) -> list[list[Pair]]:
        """Cut the same way whatever is done already: a batch rounds as a whole."""
        size = self.batch_size
        return [self.pairs[i : i + size] for i in range(0, len(self.pairs), size)]

    def metadata(self) -> dict[str, Any]:
        config = self.pipeline.transformer.config
        return {
            "model": self.pipeline.name,
            "blocks": config.depth,
            "hidden": config.hidden,
            "rows": self.rows,
            "tokens": self.tokens(),
            "pairs": self.pairs,
            "sigmas": self.trajectories.sigmas,
            "cfg_weight": self.trajectories.cfg_weight,
            "arrays": block_cache.array_names(config.depth, self.entry_only),
        }

    def tokens(self) -> tuple[int, int]:
        """Image tokens and text tokens of a row."""
        latent, text, _, _ = transformer_inputs(
            self.trajectories, self.pairs[:1], self.pipeline.dtype
        )
        rows, columns = self.pipeline.transformer.patch_grid(latent)
        return rows * columns, text.shape[1]

    def sample_bytes(self) -> int:
        """Disk that one sample takes."""
        config = self.pipeline.transformer.config
        size = 4 if self.pipeline.dtype in (mx.float32, mx.bfloat16) else 2
        return block_cache.sample_bytes(config, *self.tokens(), self.rows, size, self.entry_only)


def cache_adaround_data(
    calib_dir: str | Path = "calibration_data",
    output_dir: str | Path | None = None,
    *,
    model: Model | None = None,
    num_images: int = 5,
    stride: int = 5,
    batch_size: int = 4,
    entry_only: bool = False,
    force: bool = False,
) -> Path:
    """Fills the cache and gives its path; goes on where an earlier run was stopped."""
    calib_dir, ranks = Path(calib_dir), Ranks.here()
    folder = calib_dir / "adaround_cache" if output_dir is None else Path(output_dir)
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {batch_size}")
    trajectories = Trajectories.open(calib_dir)
    pairs = strided_pairs(trajectories, num_images, stride)
    pipeline = load_pipeline(chosen(model, trajectories.made_from["model"]))
    trajectories = Trajectories.open(calib_dir, pipeline)
    require_writable(folder)
    plan = Plan(pipeline, trajectories, pairs, stride, batch_size, entry_only)
    with folder_lock(folder, rank=ranks.store_rank):
        manifest = open_manifest(
            folder,
            ranks,
            format=block_cache.FORMAT,
            version=block_cache.VERSION,
            settings=plan.settings(),
            made_from=plan.made_from(),
            force=force,
        )
        todo = [batch for batch in plan.batches() if manifest.pending(map(unit_name, batch))]
        if ranks.rank == 0:
            announce(folder, plan, sum(map(len, todo)))
        mine = todo[ranks.rank :: ranks.size]
        for batch in tqdm(mine, desc="block cache", unit="batch", disable=not mine):
            cache_batch(folder, plan, batch)
            for pair in batch:
                manifest.mark(unit_name(pair), [sample_name(*pair)])
        if ranks.rank == 0 and manifest.pending([METADATA_UNIT]):
            block_cache.save_metadata(folder, plan.metadata())
            manifest.mark(METADATA_UNIT, [block_cache.METADATA_NAME])
        ranks.barrier()
        if ranks.rank == 0:
            manifest.finish([*map(unit_name, pairs), METADATA_UNIT])
    return folder


def unit_name(pair: Pair) -> str:
    return f"{pair[0]:04d}_{pair[1]:03d}"


def announce(folder: Path, plan: Plan, samples: int) -> None:
    """Says what the work will take, and refuses it where the disk is too small."""
    one = plan.sample_bytes()
    needed, free = samples * one, free_bytes(folder)
    click.echo(
        f"{samples} of {len(plan.pairs)} samples to cache, one forward pass each: "
        f"{human_bytes(one)} a sample, about {human_bytes(needed)} in {folder}"
    )
    if needed > free:
        hint = "take fewer images or a larger --stride, or choose another disk"
        if not plan.entry_only:
            hint = f"--entry-only stores what enters block 0 alone; or {hint}"
        raise UserError(
            f"the block cache needs {human_bytes(needed)}, the disk of {folder} has "
            f"{human_bytes(free)} free; {hint}"
        )


def cache_batch(folder: Path, plan: Plan, pairs: list[Pair]) -> None:
    """One forward pass of some samples together, and all their files."""
    inputs = transformer_inputs(plan.trajectories, pairs, plan.pipeline.dtype)
    with captured_blocks(plan.pipeline.transformer) as trace:
        mx.eval(plan.pipeline.transformer(*inputs))
    block_cache.save_samples(folder, pairs, trace, plan.entry_only)


@command()
@click.option("--calib-dir", default="calibration_data", help="Folder that stage 1 filled.")
@click.option("--output-dir", help="Folder to fill.  [default: CALIB_DIR/adaround_cache]")
@model_options(help=f"{', '.join(MODELS)} or a folder.  [default: what stage 1 used]")
@click.option("--num-images", default=5, help="How many of stage 1's images to replay.")
@click.option("--stride", default=5, help="Every how many steps one is replayed.")
@click.option("--batch-size", default=4, help="Samples per forward pass.")
@click.option(
    "--entry-only",
    is_flag=True,
    help="Store what enters block 0 only; later work computes on. [off]",
)
@click.option(
    "--force", is_flag=True, help="Start afresh in a folder that holds other work.  [off]"
)
def main(calib_dir: str, **settings: Any) -> None:
    """Weight track: replay stored steps and keep what enters and leaves every block.

    \b
    Example:
      python -m src.cache_adaround_data --num-images 5 --stride 5
    """
    start = time.perf_counter()
    folder = cache_adaround_data(calib_dir, **settings)
    seconds, peak = time.perf_counter() - start, human_bytes(peak_memory_bytes())
    click.echo(f"block cache is in {folder}, {seconds:.1f} s, peak {peak}")


if __name__ == "__main__":
    main()
