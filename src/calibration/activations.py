"""The folder of activation statistics.

manifest.json               settings, calibration data and model; every file with its sha256
images/IIII_SSS.npz         statistics of one step of one image
timestep_stats/step_N.npz   the same over all images, per input of a linear
timestep_stats/step_N_index.json   what is one number per input: largest value and percentiles
layer_statistics.json       sigma_map, step_keys, and whose input each linear reads
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..models.mmdit import MMDiT
from ..models.paths import module_at
from ..store import (
    MANIFEST_NAME,
    hash_file,
    read_json,
    read_manifest,
    save_npz,
    write_json,
)
from . import histogram
from .statistics import CENTRED, Sample, flat, fold, input_paths, is_post_gelu, load_flat

FORMAT, VERSION = "ditq-activations", 1
STATISTICS_NAME = "layer_statistics.json"
PERCENTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999, "p100": 1.0}
PATTERNS = ("images/*_*.npz", "timestep_stats/step_*.npz", "timestep_stats/step_*_index.json")
HINT = "run `python -m src.collect_layer_activations` first"
BYTES_PER_CHANNEL = 4 * 4  # minimum, maximum, mean, square
BYTES_PER_INPUT = 2 * 4 * histogram.BINS + 2048  # both histograms and the npz's own


def sample_name(image: int, step: int) -> str:
    return f"images/{image:04d}_{step:03d}.npz"


def step_name(step: int) -> str:
    return f"timestep_stats/step_{step}.npz"


def index_name(step: int) -> str:
    return f"timestep_stats/step_{step}_index.json"


def save_sample(folder: Path, image: int, step: int, sample: dict[str, Sample]) -> None:
    save_npz(folder / sample_name(image, step), **flat(sample))


def sample_bytes(model: MMDiT) -> int:
    """Disk that the statistics of one step of one image take, estimated."""
    inputs = set(input_paths(model).values())
    channels = sum(channels_of(model).values())
    return BYTES_PER_CHANNEL * channels + BYTES_PER_INPUT * len(inputs)


def channels_of(model: MMDiT) -> dict[str, int]:
    """Input channels by the path under which an input is recorded."""
    return {p: module_at(model, p).weight.shape[1] for p in set(input_paths(model).values())}


def fold_step(folder: Path, images: Sequence[int], step: int) -> list[str]:
    """Writes one step's statistics over all images; the names of its files."""
    samples = [load_flat(folder / sample_name(image, step)) for image in images]
    folded = {path: fold([sample[path] for sample in samples]) for path in samples[0]}
    save_npz(folder / step_name(step), **flat(folded))
    index = {path: describe(statistics) for path, statistics in folded.items()}
    write_json(folder / index_name(step), {"format": FORMAT, "version": VERSION, "layers": index})
    return [step_name(step), index_name(step)]


def describe(statistics: Sample) -> dict[str, float]:
    """The numbers of one input: largest absolute value and percentiles, also about the shift."""
    absmax = float(np.maximum(-statistics["minimum"], statistics["maximum"]).max())
    numbers = {"tensor_absmax": absmax}
    numbers |= percentiles("hist", statistics["hist"], absmax)
    if "shift" in statistics:
        centred = centred_absmax(statistics)
        numbers["centred_absmax"] = centred
        numbers |= percentiles(CENTRED, statistics[CENTRED], centred)
    return numbers


def centred_absmax(statistics: Sample) -> float:
    """Largest |x - shift| over all channels, exact."""
    shift = statistics["shift"]
    below, above = shift - statistics["minimum"], statistics["maximum"] - shift
    return float(np.maximum(below, above).max())


def percentiles(name: str, counts: np.ndarray, largest: float) -> dict[str, float]:
    return {
        f"{name}_{label}": histogram.percentile(counts, share, largest)
        for label, share in PERCENTILES.items()
    }


def write_statistics(
    folder: Path, model: MMDiT, made_from: dict[str, Any], sigmas: dict[int, float], images: int
) -> str:
    """layer_statistics.json; its name."""
    channels = channels_of(model)
    layers = {
        path: {"input": source, "channels": channels[source], "post_gelu": is_post_gelu(path)}
        for path, source in input_paths(model).items()
    }
    data = {
        "format": FORMAT,
        "version": VERSION,
        "made_from": made_from,
        "step_keys": list(sigmas),
        "sigma_map": {str(step): sigma for step, sigma in sigmas.items()},
        "num_images": images,
        "layers": layers,
    }
    write_json(folder / STATISTICS_NAME, data)
    return STATISTICS_NAME


@dataclass(frozen=True)
class InputStatistics:
    """One input over all step keys; arrays are (steps, channels) or (steps, BINS)."""

    path: str
    minimum: np.ndarray
    maximum: np.ndarray
    avg_min: np.ndarray
    avg_max: np.ndarray
    mean: np.ndarray
    square: np.ndarray
    hist: np.ndarray
    shift: np.ndarray | None = None
    hist_centred: np.ndarray | None = None

    @property
    def absmax(self) -> np.ndarray:
        """(steps, channels) largest absolute values."""
        return np.maximum(-self.minimum, self.maximum)


@dataclass(frozen=True)
class ActivationStatistics:
    """A finished folder, read back."""

    folder: Path
    made_from: dict[str, Any]
    hash: str  # of the manifest, and with it of every file
    step_keys: list[int]
    sigmas: list[float]
    layers: dict[str, str]  # linear path to the path of its input
    inputs: dict[str, InputStatistics]

    @classmethod
    def open(cls, folder: str | Path) -> ActivationStatistics:
        """Reads a whole folder; missing steps, damaged files and NaN are errors that name them."""
        folder = Path(folder)
        data = read_manifest(folder, FORMAT, VERSION, HINT)
        head = read_json(folder / STATISTICS_NAME, FORMAT, VERSION, HINT)
        try:
            steps, layers = head["step_keys"], head["layers"]
            sigmas = [head["sigma_map"][str(step)] for step in steps]
            sources = {path: layer["input"] for path, layer in layers.items()}
            channels = {layer["input"]: layer["channels"] for layer in layers.values()}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / STATISTICS_NAME} is not whole ({error!r}); {HINT}"
            ) from None
        loaded = [load_step(folder / step_name(step), channels) for step in steps]
        inputs = {path: stacked(path, loaded) for path in sorted(channels)}
        digest = hash_file(folder / MANIFEST_NAME)
        return cls(folder, data["made_from"], digest, steps, sigmas, sources, inputs)

    @classmethod
    def of(
        cls,
        model: MMDiT,
        sigmas: Mapping[int, float],
        samples: Mapping[int, Sequence[dict[str, Sample]]],
    ) -> ActivationStatistics:
        """Statistics that were collected in memory: per step key, those of each image."""
        folded = [
            {path: fold([sample[path] for sample in images]) for path in images[0]}
            for images in (samples[step] for step in sigmas)
        ]
        inputs = {path: stacked(path, folded) for path in sorted(folded[0])}
        levels = list(sigmas.values())
        return cls(Path(), {}, "", list(sigmas), levels, input_paths(model), inputs)


def load_step(path: Path, channels: dict[str, int]) -> dict[str, Sample]:
    """One step_N.npz, in which every input must be there in its size."""
    expect = {}
    for name, size in channels.items():
        vectors = ["minimum", "maximum", "avg_min", "avg_max", "mean", "square"]
        counts = ["hist"]
        if is_post_gelu(name):
            vectors, counts = [*vectors, "shift"], [*counts, CENTRED]
        expect |= {f"{name}__{v}": ("float32", (size,)) for v in vectors}
        expect |= {f"{name}__{c}": ("int64", (histogram.BINS,)) for c in counts}
    return load_flat(path, expect, HINT)


def stacked(path: str, steps: Sequence[dict[str, Sample]]) -> InputStatistics:
    arrays = {name: np.stack([step[path][name] for step in steps]) for name in steps[0][path]}
    return InputStatistics(path, **arrays)
