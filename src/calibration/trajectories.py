"""The calibration folder: every step of the 16-bit model's sampling runs, image by image.

manifest.json            prompts, seeds, guidance, schedule, model hash; every file of every image
samples/IIII_SSS.npz     x, the latent that entered step S of image I; timestep and sigma
conditioning/IIII.npz    text and pooled of the prompt, and of the negative one under guidance
latents/IIII.npz         x, the finished latent
images/IIII.png          the picture
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..models.load import Model, chosen, load_pipeline
from ..models.pipeline import Conditioning, Pipeline
from ..sampling import Step
from ..sampling.schedule import TRAINING_STEPS
from ..store import (
    MANIFEST_NAME,
    atomic_write,
    hash_file,
    load_npz,
    read_manifest,
    require_match,
    save_npz,
)

FORMAT, VERSION = "ditq-calibration", 1

# Names that are this stage's own; --force removes them also where a killed run left them unlisted.
PATTERNS = ("samples/*_*.npz", "conditioning/*.npz", "latents/*.npz", "images/*.png")
NPZ_OVERHEAD_BYTES = 1024
PICTURE_BYTES_PER_PIXEL = 2  # a PNG of a photograph-like picture, roughly


def sample_name(image: int, step: int) -> str:
    return f"samples/{image:04d}_{step:03d}.npz"


def conditioning_name(image: int) -> str:
    return f"conditioning/{image:04d}.npz"


def latent_name(image: int) -> str:
    return f"latents/{image:04d}.npz"


def picture_name(image: int) -> str:
    return f"images/{image:04d}.png"


def image_files(image: int, num_steps: int) -> list[str]:
    """All files of one image, relative to the folder."""
    steps = [sample_name(image, step) for step in range(num_steps)]
    return [*steps, conditioning_name(image), latent_name(image), picture_name(image)]


class TrajectoryWriter:
    """A sampling callback that writes what enters each step, one file per image."""

    def __init__(self, folder: Path, images: Sequence[int]) -> None:
        self._folder, self._images = folder, images

    def step(self, step: Step) -> None:
        sigma = np.float32(step.sigma)
        for image, latent in zip(self._images, np.array(step.latent), strict=True):
            save_npz(
                self._folder / sample_name(image, step.index),
                x=latent,
                timestep=np.float32(TRAINING_STEPS * sigma),
                sigma=sigma,
            )


def save_conditioning(folder: Path, images: Sequence[int], conditioning: Conditioning) -> None:
    """One file per image; the rows after the prompts' are the negatives'."""
    text, pooled = as_numpy(conditioning.text), as_numpy(conditioning.pooled)
    for row, image in enumerate(images):
        arrays = {"text": text[row], "pooled": pooled[row]}
        if len(text) > len(images):
            negative = len(images) + row
            arrays |= {"negative_text": text[negative], "negative_pooled": pooled[negative]}
        save_npz(folder / conditioning_name(image), **arrays)


def load_conditioning(folder: Path, images: Sequence[int], dtype: mx.Dtype) -> Conditioning:
    """The images' rows, then their negatives' where the folder was made with guidance."""
    loaded = [load_npz(folder / conditioning_name(i), finite=True) for i in images]
    prefixes = ["", "negative_"] if "negative_text" in loaded[0] else [""]

    def rows(name: str) -> mx.array:
        stacked = [arrays[prefix + name] for prefix in prefixes for arrays in loaded]
        return mx.array(np.stack(stacked)).astype(dtype)

    return Conditioning(rows("text"), rows("pooled"))


def save_results(
    folder: Path, images: Sequence[int], latents: mx.array, pictures: np.ndarray
) -> None:
    """The finished latents and their pictures."""
    for image, latent, picture in zip(images, as_numpy(latents), pictures, strict=True):
        save_npz(folder / latent_name(image), x=latent)
        with atomic_write(folder / picture_name(image)) as file:
            Image.fromarray(picture).save(file, "PNG")


def as_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(stored_dtype(array.dtype)))


def stored_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """npz has no bfloat16; float32 holds all of its values."""
    return mx.float32 if dtype == mx.bfloat16 else dtype


def image_bytes(
    latent_shape: tuple[int, int, int], num_steps: int, conditioning_bytes: int, pixels: int
) -> int:
    """Disk that one image takes, estimated: its latents in float32, its text, its picture."""
    latent = 4 * int(np.prod(latent_shape)) + NPZ_OVERHEAD_BYTES
    return (num_steps + 1) * latent + conditioning_bytes + PICTURE_BYTES_PER_PIXEL * pixels


@dataclass(frozen=True)
class Trajectories:
    """A finished calibration folder, read back."""

    folder: Path
    settings: dict[str, Any]
    made_from: dict[str, Any]
    hash: str  # of the manifest, and with it of every file

    @classmethod
    def open(cls, folder: str | Path, pipeline: Pipeline | None = None) -> Trajectories:
        """Checks that stage 1 has finished the folder, with this very model if one is given."""
        folder = Path(folder)
        hint = "run `python -m src.generate_calibration_data` first"
        data = read_manifest(folder, FORMAT, VERSION, hint)
        if pipeline is not None:
            wanted = {"model": pipeline.name, "model_hash": pipeline.hash}
            way_out = "give the model that made the folder, or make the folder again"
            require_match(folder / MANIFEST_NAME, data["made_from"], wanted, way_out)
        digest = hash_file(folder / MANIFEST_NAME)
        return cls(folder, data["settings"], data["made_from"], digest)

    @property
    def num_images(self) -> int:
        return len(self.settings["prompts"])

    @property
    def num_steps(self) -> int:
        return self.settings["num_steps"]

    @property
    def sigmas(self) -> list[float]:
        """num_steps + 1 of them, the last one 0."""
        return self.settings["schedule"]["sigmas"]

    @property
    def cfg_weight(self) -> float:
        return self.settings["cfg_weight"]

    def latent(self, image: int, step: int) -> np.ndarray:
        """(height, width, channels) float32, what entered that step; finite or an error."""
        if step == self.num_steps:
            return load_npz(self.folder / latent_name(image), finite=True)["x"]
        return load_npz(self.folder / sample_name(image, step), finite=True)["x"]

    def conditioning(self, images: Sequence[int], dtype: mx.Dtype) -> Conditioning:
        """The images' rows, then their negatives' where the folder was made with guidance."""
        return load_conditioning(self.folder, images, dtype)


def open_with_pipeline(
    folder: str | Path, model: Model | None = None
) -> tuple[Trajectories, Pipeline]:
    """A finished calibration folder and the model that made it.

    `model` (a name or a path) is needed where the recorded name alone does not lead to it.
    """
    recorded = Trajectories.open(folder).made_from["model"]
    pipeline = load_pipeline(chosen(model, recorded))
    return Trajectories.open(folder, pipeline), pipeline
