"""The block cache: what enters and leaves every block of the 16-bit model at some stored steps.

metadata.json           model, shapes, which images and steps
samples/IIII_SSS.npz    image_0 … image_D, text_0 … text_(D-1): what enters block i, and so what
                        leaves block i - 1; conditioning: what every modulation reads. The first
                        axis holds the prompt's row and, under guidance, the negative's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..models.configs import MMDiTConfig
from ..models.pipeline import Pipeline
from ..store import (
    MANIFEST_NAME,
    hash_file,
    load_npz,
    read_json,
    read_manifest,
    require_match,
    save_npz,
    write_json,
)
from .capture import BlockTrace
from .replay import Pair
from .trajectories import NPZ_OVERHEAD_BYTES, as_numpy, sample_name

FORMAT, VERSION = "ditq-adaround-cache", 1
METADATA_FORMAT = "ditq-adaround-metadata"
METADATA_NAME = "metadata.json"
HINT = "run `python -m src.cache_adaround_data` first"


def array_names(depth: int, entry_only: bool) -> list[str]:
    """The arrays of one sample."""
    images, texts = (1, 1) if entry_only else (depth + 1, depth)
    named = [f"image_{i}" for i in range(images)] + [f"text_{i}" for i in range(texts)]
    return [*named, "conditioning"]


def sample_bytes(
    config: MMDiTConfig, image_tokens: int, text_tokens: int, rows: int, size: int, entry_only: bool
) -> int:
    """Disk that one sample takes; `size` is the bytes of a number."""
    images, texts = (1, 1) if entry_only else (config.depth + 1, config.depth)
    tokens = images * image_tokens + texts * text_tokens + 1  # the conditioning is one more
    names = len(array_names(config.depth, entry_only))
    return rows * tokens * config.hidden * size + names * NPZ_OVERHEAD_BYTES


def save_samples(folder: Path, pairs: list[Pair], trace: BlockTrace, entry_only: bool) -> None:
    """One file per pair; the trace's rows are the prompts', then the negatives'."""
    arrays = {name: as_numpy(array) for name, array in trace.arrays(entry_only).items()}
    for place, (image, step) in enumerate(pairs):
        own = {name: array[place :: len(pairs)] for name, array in arrays.items()}
        save_npz(folder / sample_name(image, step), **own)


def save_metadata(folder: Path, data: dict[str, Any]) -> None:
    write_json(folder / METADATA_NAME, {"format": METADATA_FORMAT, "version": VERSION, **data})


@dataclass(frozen=True)
class BlockCache:
    """A finished cache folder, read back block by block."""

    folder: Path
    settings: dict[str, Any]
    made_from: dict[str, Any]
    metadata: dict[str, Any]
    hash: str  # of the manifest, and with it of every file

    @classmethod
    def open(cls, folder: str | Path, pipeline: Pipeline | None = None) -> BlockCache:
        """Checks that the folder is finished, and made with this very model if one is given."""
        folder = Path(folder)
        data = read_manifest(folder, FORMAT, VERSION, HINT)
        if pipeline is not None:
            wanted = {**data["made_from"], "model": pipeline.name, "model_hash": pipeline.hash}
            way_out = "give the model that made the cache, or make the cache again"
            require_match(folder / MANIFEST_NAME, data["made_from"], wanted, way_out)
        metadata = read_json(folder / METADATA_NAME, METADATA_FORMAT, VERSION, HINT)
        digest = hash_file(folder / MANIFEST_NAME)
        return cls(folder, data["settings"], data["made_from"], metadata, digest)

    @property
    def pairs(self) -> list[Pair]:
        """Image and step of every sample, in the order of all arrays."""
        return [tuple(pair) for pair in self.metadata["pairs"]]

    @property
    def entry_only(self) -> bool:
        return self.settings["entry_only"]

    @property
    def step_keys(self) -> list[int]:
        """The steps that were cached, rising."""
        return sorted({step for _, step in self.pairs})

    @property
    def sigmas(self) -> list[float]:
        """Of the step keys."""
        return [self.metadata["sigmas"][key] for key in self.step_keys]

    def step_index(self) -> np.ndarray:
        """Of every row of `stacked`, the place of its step among the step keys."""
        place = {key: i for i, key in enumerate(self.step_keys)}
        return np.repeat([place[step] for _, step in self.pairs], self.metadata["rows"])

    def stacked(self, names: list[str]) -> dict[str, mx.array]:
        """These arrays of all samples, (samples · rows, …) each: sample by sample."""
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for image, step in self.pairs:
            path = self.folder / sample_name(image, step)
            sample = load_npz(path, finite=True, hint=HINT, only=names)
            for name in names:
                if name not in sample:
                    raise UserError(f"{path} has no array {name!r}; {HINT}")
                parts[name].append(sample[name])
        return {name: mx.array(np.concatenate(arrays)) for name, arrays in parts.items()}
