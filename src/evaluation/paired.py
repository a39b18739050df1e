"""Two pictures of one name, or of one prompt and seed: how far they are apart, over all pairs."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import UserError
from ..metrics.fidelity import Reference, bootstrap_interval, teacher_forced_sqnr
from ..metrics.psnr import psnr
from ..metrics.signal import sqnr_db
from ..metrics.ssim import WINDOW, ssim
from ..models.pipeline import Pipeline
from .sources import Batch, Drawing, Folder

TRAIL = 64  # captions of which the velocity is compared
SHOWN = 4  # of the first pairs, and as many of the worst


@dataclass(frozen=True)
class Example:
    """One pair to be shown."""

    caption: str
    psnr: float  # dB
    reference: np.ndarray
    picture: np.ndarray


@dataclass
class Pairs:
    """Figures of every pair, and a few of the pairs themselves."""

    names: list[str] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    first: list[Example] = field(default_factory=list)
    _worst: list[tuple[float, int, Example]] = field(default_factory=list)

    def add(self, reference: Batch, found: Batch, latents: bool) -> None:
        """Takes in a batch of both, in one order; `latents` says whether those can be compared."""
        for index, (wanted, got) in enumerate(zip(reference.pictures, found.pictures, strict=True)):
            figures = {"psnr": psnr(wanted, got), "ssim": ssim(wanted, got)}
            if latents:
                figures["latent"] = sqnr_db(reference.latents[index], found.latents[index])
            for name, value in figures.items():
                self.values.setdefault(name, []).append(value)
            text = found.prompts[index] if found.prompts else found.names[index]
            self.names.append(found.names[index])
            self.show(Example(text, figures["psnr"], wanted, got))

    def show(self, example: Example) -> None:
        """Keeps the first ones and the worst ones."""
        if len(self.first) < SHOWN:
            self.first.append(example)
        heapq.heappush(self._worst, (-example.psnr, len(self.names), example))
        if len(self._worst) > SHOWN:
            heapq.heappop(self._worst)

    @property
    def worst(self) -> list[Example]:
        """The worst one first."""
        return [example for *_, example in sorted(self._worst, key=lambda kept: kept[:2])][::-1]

    def summary(self) -> dict[str, Any]:
        """Medians with their intervals first: means are ruled by the few pictures in which an
        object moves. What is infinite, where pictures are equal, is None."""
        equal = int(np.sum(np.isposinf(self.values["psnr"])))
        table = {name: figure_summary(np.array(self.values[name])) for name in self.values}
        return {"count": len(self.names), "equal": equal, "figures": table}

    def each(self) -> list[dict[str, Any]]:
        """Pair by pair."""
        columns = {n: [finite(v) for v in values] for n, values in self.values.items()}
        rows = zip(self.names, *columns.values(), strict=True)
        return [dict(zip(("name", *columns), row, strict=True)) for row in rows]


def figure_summary(values: np.ndarray) -> dict[str, Any]:
    """Median, worst and mean of one value a pair."""
    return {
        "median": finite(np.median(values)),
        "median_interval": interval(values, np.median),
        "worst": finite(values.min()),
        "mean": finite(values.mean()),
        "mean_interval": interval(values, np.mean),
    }


def interval(values: np.ndarray, of: Any) -> list[float] | None:
    """95 % bootstrap interval, none where equal pictures have no finite decibels."""
    if not np.all(np.isfinite(values)):
        return None
    return list(bootstrap_interval(values, of=of))


def finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


@dataclass
class Velocities:
    """The guided velocity on the reference's own latents: methods are ranked by it."""

    reference: Drawing
    found: Pipeline
    tables: list[np.ndarray] = field(default_factory=list)  # (steps, captions) dB

    def add(self, batch: Batch) -> None:
        """Takes in the reference's batch, if its steps were kept."""
        if not batch.steps:
            return
        steps, weight = batch.steps, self.reference.cfg_weight
        way = Reference(
            # Encoded by the model that is asked, since the text decides in which type it computes.
            self.found.condition(list(batch.prompts), weight),
            weight,
            [step.sigma for step in steps],
            [step.latent for step in steps],
            [step.velocity for step in steps],
        )
        self.tables.append(teacher_forced_sqnr(self.found.transformer, way))

    @property
    def table(self) -> np.ndarray:
        """(steps, captions) dB."""
        return np.concatenate(self.tables, axis=1)

    def summary(self) -> dict[str, Any]:
        by_caption = self.table.mean(axis=0)
        return {
            "captions": len(by_caption),
            "mean": finite(by_caption.mean()),
            "mean_interval": interval(by_caption, np.mean),
            "sigmas": self.reference.sigmas,
            "by_step": [finite(value) for value in self.table.mean(axis=1)],
            "by_caption": [finite(value) for value in by_caption],
        }


def pairs_up(reference: Folder | Drawing, found: Folder | Drawing) -> str | None:
    """Why the pictures are no pairs; None where they are."""
    if isinstance(reference, Folder) != isinstance(found, Folder):
        return "one side is a folder and the other a model"
    if reference.names != found.names:
        lone = sorted(set(reference.names) ^ set(found.names))[0]
        return f"names differ, as {lone}, which is on one side only"
    if isinstance(reference, Drawing) and reference.seeds != found.seeds:
        return "the seeds differ"
    return None


def check_sizes(reference: Folder | Drawing, found: Folder | Drawing) -> None:
    """Raises for pairs that cannot be compared."""
    if reference.size != found.size:
        (one, two), (three, four) = found.size, reference.size
        raise UserError(
            f"{found.title} has pictures of {one}x{two}, {reference.title} of {three}x{four}; give "
            "pictures of one size, or --no-paired to compare them as sets"
        )
    if min(found.size) < WINDOW:
        raise UserError(
            f"{found.title} has pictures of {found.size[0]}x{found.size[1]}, SSIM needs {WINDOW} "
            "pixels; give larger ones, or --no-paired to compare them as sets"
        )


def same_model(reference: Folder | Drawing, found: Folder | Drawing) -> bool:
    """Whether latents and velocities of both mean the same."""
    both = isinstance(reference, Drawing) and isinstance(found, Drawing)
    return both and reference.pipeline.name == found.pipeline.name
