"""`ditq demo`: the stages on nano, from nothing."""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
from PIL import Image

from .calibration.trajectories import Trajectories, picture_name
from .cli import command, peak_memory_bytes
from .generate_calibration_data import generate_calibration_data
from .report.sheet import contact_sheet
from .store import human_bytes


def demo(folder: str | Path = "demo", *, num_images: int = 8, num_steps: int = 30) -> Path:
    """Runs the stages in `folder` and gives the path of the pictures' sheet."""
    folder = Path(folder)
    calibration = generate_calibration_data(
        "nano", folder / "calibration_data", num_images=num_images, num_steps=num_steps
    )
    return sheet_of(Trajectories.open(calibration), folder / "pictures.png")


def sheet_of(trajectories: Trajectories, path: Path) -> Path:
    """All pictures of a calibration folder, each above its prompt."""
    images = range(trajectories.num_images)
    pictures = [np.asarray(Image.open(trajectories.folder / picture_name(i))) for i in images]
    contact_sheet(np.stack(pictures), path, trajectories.settings["prompts"], columns=4)
    return path


@command()
@click.option("--folder", default="demo", help="Where to work; a second run goes on there.")
@click.option("--num-images", default=8, help="Pictures to sample.")
@click.option("--num-steps", default=30, help="Steps of each.")
def main(folder: str, **settings: int) -> None:
    """Run the stages on nano, from nothing.

    \b
    Example:
      ditq demo
    """
    start = time.perf_counter()
    sheet = demo(folder, **settings)
    seconds, peak = time.perf_counter() - start, human_bytes(peak_memory_bytes())
    click.echo(f"look at {sheet}; made in {seconds:.1f} s, peak {peak}")


if __name__ == "__main__":
    main()
