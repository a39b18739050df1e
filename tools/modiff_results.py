"""Figures of MoDiff's rows: taken from what was drawn, kept in small files, and merged from them.

A Fréchet distance depends on how many pictures a set has, so each row's distances are kept for the
first 500, 1000, 2000 … of its pictures, and rows are compared at a count that both have. A row that
was stopped early counts as far as its batches are whole.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.evaluation.networks import Features, Identity
from src.evaluation.statistics import Statistics, load_statistics
from src.mass_sampling.work import FEATURES, features_name
from src.metrics.fidelity import bootstrap_interval
from src.metrics.frechet import Moments
from src.metrics.signal import decibel
from src.store import load_npz, read_json, write_json

import numpy as np

from tools.bench_common import machine

FORMAT, VERSION = "ditq-modiff-row", 1
COUNTS = (500, 1000, 2000, 5000, 10_000, 20_000, 30_000, 40_000, 50_000)
LATENT_FIGURES = ("latent", "latent_own_weights")  # of the first pictures, whatever follows
Sets = dict[int, tuple[Moments, Moments]]  # of the first so many: pooled and spatial features


@dataclass(frozen=True)
class Took:
    """What drawing a row took, opening its model and measuring its scales included."""

    pictures: int
    seconds: float


class Limit:
    """How far a run goes: so many seconds, and so many pictures a row. A batch that would end late,
    by the longest one so far, is not begun."""

    def __init__(self, seconds: float | None, pictures: int | None) -> None:
        self._until = None if seconds is None else time.perf_counter() + seconds
        self._pictures, self._longest, self._begun = pictures, 0.0, None

    def time_left(self) -> bool:
        return self._until is None or time.perf_counter() + self._longest < self._until

    def wants(self, batch: range) -> bool:
        """Whether the batch is among the pictures that a row is to have."""
        return self._pictures is None or batch.start < self._pictures

    def end_batch(self) -> None:
        """Of the one that was begun last; also at the end of a row, as opening the next row's model
        is no part of a batch's time."""
        if self._begun is not None:
            self._longest = max(self._longest, time.perf_counter() - self._begun)
        self._begun = None

    def __call__(self, batch: range) -> bool:
        """Whether the batch of these pictures is to be drawn, and if so, begins it."""
        self.end_batch()
        goes_on = self.time_left() and self.wants(batch)
        if goes_on:
            self._begun = time.perf_counter()
        return goes_on


def counts_of(pictures: int, identity: Identity) -> list[int]:
    """Of how many first pictures distances are taken: more than features, or they are undefined."""
    counts = [*(count for count in COUNTS if count < pictures), pictures]
    return [count for count in counts if count > max(identity.pooled, identity.spatial)]


def growing(
    parts: Iterator[Features], identity: Identity, counts: Sequence[int]
) -> Iterator[tuple[int, Statistics]]:
    """Statistics of the first so many pictures, for each count; parts are cut where one ends."""
    statistics, left = Statistics(identity), list(counts)
    for part in parts if left else ():
        start, size = 0, len(part.pooled)
        while start < size:
            stop = min(size, start + left[0] - statistics.count)
            piece = {kind: getattr(part, kind)[start:stop] for kind in FEATURES}
            statistics.add(Features(**piece), [str(statistics.count)] * (stop - start))
            start = stop
            if statistics.count == left[0]:
                yield left.pop(0), statistics
            if not left:
                return


def drawn_features(folder: Path, batches: Sequence[range]) -> Iterator[Features]:
    for batch in batches:
        arrays = load_npz(folder / features_name(batch), only=FEATURES)
        yield Features(**{kind: arrays[kind] for kind in FEATURES})


def whole_batches(folder: Path, batches: Sequence[range]) -> list[range]:
    """The first ones, as far as all of them were drawn."""
    missing = (i for i, b in enumerate(batches) if not (folder / features_name(b)).exists())
    return list(batches[: next(missing, len(batches))])


def kept_counts(folder: Path) -> list[int]:
    """Of how many first pictures the folder has statistics."""
    return sorted(int(path.stem) for path in folder.glob("*.npz"))


def kept_sets(
    folder: Path,
    counts: Sequence[int],
    identity: Identity,
    features: Callable[[], Iterator[Features]],
) -> Sets:
    """Moments of the first so many pictures, computed from their features where the folder has
    none."""
    kept = kept_counts(folder)
    missing = [count for count in counts if count not in kept]
    if missing:
        for count, statistics in growing(features(), identity, missing):
            statistics.save(folder / f"{count}.npz")
    known = {count: load_statistics(folder / f"{count}.npz", identity) for count in counts}
    return {count: (of.pooled, of.spatial) for count, of in known.items()}


def moments_of(statistics: Statistics) -> tuple[Moments, Moments]:
    return statistics.known.pooled, statistics.known.spatial


def set_figures(statistics: Statistics, count: int, truth: Sets, other: Sets) -> dict[str, Any]:
    """Of one set of pictures, against others of the same size."""
    (pooled, spatial), score = moments_of(statistics), statistics.score
    figures: dict[str, Any] = {"inception_score": [score.mean, score.deviation]}
    if count in truth:
        figures["fid"] = pooled.distance(truth[count][0])
        figures["sfid"] = spatial.distance(truth[count][1])
    if count in other:
        figures["to_full_precision"] = pooled.distance(other[count][0])
    return figures


def latent_figures(wanted: np.ndarray, got: np.ndarray) -> dict[str, Any]:
    """dB of each picture's finished latent, of those that both rows have."""
    count = min(len(wanted), len(got))
    wanted, got = wanted[:count], got[:count]
    axes = (1, 2, 3)
    signal = np.square(wanted, dtype=np.float64).sum(axis=axes)
    error = np.square(np.subtract(wanted, got, dtype=np.float64)).sum(axis=axes)
    values = np.array([decibel(s, e) for s, e in zip(signal, error, strict=True)])
    return {
        "pictures": count,
        "mean": float(values.mean()),
        "interval": bootstrap_interval(values),
        "median": float(np.median(values)),
        "worst": float(values.min()),
        "pooled": decibel(float(signal.sum()), float(error.sum())),
    }


def save_result(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format": FORMAT, "version": VERSION} | result)


def merged(folders: Sequence[Path], run: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Results by row, of the folder in which a row has the most pictures; all of this `run`. Where
    a machine had not the row that latents are compared with, the figures are another's."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no folder {folder} of results; give one that a run has written")
        for path in sorted(folder.glob("*.json")):
            result = load_result(path, run)
            known = found.get(result["name"], result)
            more, less = sorted((known, result), key=lambda r: r["pictures"], reverse=True)
            found[result["name"]] = more | {k: more[k] or less[k] for k in LATENT_FIGURES}
    return found


def load_result(path: Path, run: Mapping[str, int]) -> dict[str, Any]:
    """One row's, which has to be of the same settings: another number of pictures is of other
    captions, as scenes are drawn field by field."""
    result = read_json(path, FORMAT, VERSION, "remove it, or give another --merge")
    for key, wanted in run.items():
        option = f"--{key.replace('_', '-')}"
        if key not in result:
            raise UserError(
                f"{path} does not say its {option}, so its pictures may be of other captions; "
                "remove it, and judge that row again by --report-only where it was drawn"
            )
        if result[key] != wanted:
            raise UserError(
                f"{path} is of {option} {result[key]}, this run is of {wanted}; give results of "
                f"the same {option}"
            )
    return result


def measured() -> dict[str, Any]:
    """Where a row was drawn: rows of several machines may stand side by side."""
    here = machine()
    return {key: here[key] for key in ("device", "mlx", "date")}


def without(command: str, option: str) -> str:
    """The command without an option and its value."""
    words = shlex.split(command)
    places = {i for i, word in enumerate(words) if word == option}
    places |= {i + 1 for i in places}
    places |= {i for i, word in enumerate(words) if word.startswith(f"{option}=")}
    return shlex.join(word for i, word in enumerate(words) if i not in places)
