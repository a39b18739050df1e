"""Plots of an evaluation: where the distance lies, how pairs are spread, what they look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..metrics.frechet import Moments
from ..report.plots import WIDTH, plain_style, save
from ..report.sheet import contact_sheet
from .paired import Example, Pairs, Velocities
from .work import Evaluation

BLUE, RED, GREY = "#33658a", "#c8553d", "#8d99ae"
SMALL = 256  # pixels: smaller pictures are shown twice as large
AMPLIFIED = 4  # times the difference
LABELS = {"psnr": "PSNR, dB", "ssim": "SSIM", "latent": "latent SQNR, dB"}


def plot_all(evaluation: Evaluation, output: Path) -> list[Path]:
    """Writes those that there is something for."""
    paths = []
    if evaluation.settings.fid and evaluation.other is not None:
        paths.append(output / "features.png")
        known, other = evaluation.found.statistics.known, evaluation.other
        panels = {"pooled": (known.pooled, other.pooled)}
        if other.spatial is not None:
            panels["spatial"] = (known.spatial, other.spatial)
        plot_features(panels, paths[-1])
    if evaluation.pairs is not None:
        paths.append(output / "pairs.png")
        plot_pairs(evaluation.pairs, paths[-1])
    if evaluation.velocities is not None:
        paths.append(output / "velocity.png")
        plot_velocity(evaluation.velocities, paths[-1])
    if evaluation.pairs is not None:
        paths.append(output / "pictures.png")
        plot_pictures(evaluation.pairs, paths[-1])
    return paths


def plot_features(panels: dict[str, tuple[Moments, Moments]], path: Path) -> None:
    """By direction of the reference's covariance: both variances, and how far the means are."""
    with plain_style():
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        for axes, (kind, (found, other)) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            draw_directions(axes, found, other)
            axes.set_title(f"{kind} features")
            axes.set_xlabel("direction, by variance of the reference")
        figure.axes[0].legend(fontsize=8, loc="best")
        save(figure, path)


def draw_directions(axes: Axes, found: Moments, other: Moments) -> None:
    values, vectors = np.linalg.eigh(np.asarray(other.covariance, np.float64))
    variance = values[::-1]
    own = np.einsum("ij,ij->j", vectors, found.covariance @ vectors)[::-1]
    apart = np.square((found.mean - other.mean) @ vectors)[::-1]
    floor = max(variance[0], own.max()) * 1e-9
    place = np.arange(1, len(values) + 1)
    axes.plot(place, np.maximum(apart, floor), ".", color=GREY, markersize=2, label="means, apart²")
    axes.plot(place, np.maximum(own, floor), color=RED, linewidth=1.2, label="variance, pictures")
    axes.plot(place, np.maximum(variance, floor), color=BLUE, linewidth=1.2, label="reference")
    axes.set_yscale("log")


def plot_pairs(pairs: Pairs, path: Path) -> None:
    """Every pair, from the worst to the best, one panel a figure."""
    with plain_style():
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        panels = figure.subplots(1, len(pairs.values), squeeze=False)[0]
        for axes, (name, values) in zip(panels, pairs.values.items(), strict=True):
            draw_sorted(axes, np.array(values), LABELS[name])
        save(figure, path)


def draw_sorted(axes: Axes, values: np.ndarray, label: str) -> None:
    ordered = np.sort(values)
    shares = 100 * (np.arange(len(values)) + 0.5) / len(values)
    known = np.isfinite(ordered)
    axes.plot(shares[known], ordered[known], ".-", color=BLUE, markersize=3, linewidth=1)
    median = float(np.median(values))
    if np.isfinite(median):
        axes.axhline(median, color=RED, linewidth=1, label=f"median {median:.4g}")
        axes.legend(fontsize=8, loc="best")
    axes.set_xlim(0, 100)
    axes.set_title(label)
    axes.set_xlabel("per cent of the pairs")


def plot_velocity(velocities: Velocities, path: Path) -> None:
    """SQNR over sigma: median and middle half of the captions."""
    table, sigmas = velocities.table, velocities.reference.sigmas
    low, middle, high = np.percentile(np.where(np.isfinite(table), table, np.nan), (25, 50, 75), 1)
    with plain_style():
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        axes = figure.add_subplot()
        axes.fill_between(
            sigmas, low, high, color=BLUE, alpha=0.3, linewidth=0, label="half of them"
        )
        axes.plot(sigmas, middle, ".-", color=BLUE, markersize=3, linewidth=1.2, label="median")
        axes.invert_xaxis()  # noise on the left, as everywhere
        axes.set_xlabel("σ, from noise (left) to picture")
        axes.set_ylabel("dB")
        axes.set_title("Velocity, signal to error, on the reference's latents")
        axes.legend(fontsize=8, loc="best")
        save(figure, path)


def plot_pictures(pairs: Pairs, path: Path) -> None:
    """A row of the first pairs, a row of the worst: reference, picture, amplified difference."""
    examples: Sequence[Example] = [*pairs.first, *pairs.worst]
    shown, captions = [], []
    for index, one in enumerate(examples):
        which = f"first {index + 1}" if index < len(pairs.first) else "worst"
        difference = np.abs(one.reference.astype(int) - one.picture.astype(int))
        amplified = np.clip(AMPLIFIED * difference, 0, 255).astype(np.uint8)
        shown += [one.reference, one.picture, amplified]
        decibels = f"{one.psnr:.1f} dB" if np.isfinite(one.psnr) else "equal"
        captions += [f"{which}: {one.caption}", decibels, f"difference, {AMPLIFIED} times"]
    scale = 2 if shown[0].shape[0] < SMALL else 1
    contact_sheet(np.stack(shown), path, captions, columns=6, scale=scale)
