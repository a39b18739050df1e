"""Plots of activations and tiers, legible at the width of a README."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.figure import Figure

from ..store import atomic_write

WIDTH = 9.0  # inches; with the dots per inch, 990 pixels
DPI = 110
TIER_COLOURS = {4: "#4c9f70", 6: "#f2c14e", 8: "#c8553d"}
OTHER_TIER = "#8d99ae"
BANDS = (("p50", "p99"), ("p99", "p999"), ("p999", "p100"))


@dataclass(frozen=True)
class Row:
    """One line of a heat-map: what kind of input, of which block."""

    kind: str
    block: int


def save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_write(path) as file:
        # Without the version of matplotlib the same data gives the same bytes.
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})


@contextmanager
def plain_style():
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False}):
        yield


def heat_map(
    values: np.ndarray,
    rows: Sequence[Row],
    sigmas: Sequence[float],
    draw: Callable[[Figure, Axes, np.ndarray], None],
    title: str,
    path: Path,
) -> None:
    """(rows, steps) as coloured cells, sorted by kind and then block."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i].kind, rows[i].block))
    kinds = [rows[i].kind for i in order]
    height = min(11.0, 1.6 + 0.09 * len(rows))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    draw(figure, axes, values[order])
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
    ends = [*starts[1:], len(kinds)]
    axes.set_yticks(
        [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)],
        [f"{kinds[a]}\nblocks {rows[order[a]].block} to {rows[order[b - 1]].block}"
         for a, b in zip(starts, ends, strict=True)],
    )  # fmt: skip
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=1.5)
    axes.set_xticks(*sigma_ticks(sigmas))
    axes.set_xlabel("σ, from noise (left) to picture")
    axes.set_title(title)
    save(figure, path)


def sigma_ticks(sigmas: Sequence[float]) -> tuple[list[int], list[str]]:
    places = np.unique(np.linspace(0, len(sigmas) - 1, min(8, len(sigmas))).round().astype(int))
    return places.tolist(), [f"{sigmas[i]:.2f}" for i in places]


def range_map(
    largest: np.ndarray, rows: Sequence[Row], sigmas: Sequence[float], path: Path
) -> None:
    """Largest absolute value of every input at every step, log colours."""

    def draw(figure: Figure, axes: Axes, values: np.ndarray) -> None:
        norm = LogNorm(max(values.min(), values.max() * 1e-4), values.max())
        image = axes.imshow(values, aspect="auto", cmap="magma", norm=norm, interpolation="nearest")
        bar = figure.colorbar(image, label="largest |x|", format="{x:g}")
        bar.ax.yaxis.set_minor_formatter("{x:g}")

    heat_map(np.maximum(largest, 1e-12), rows, sigmas, draw, "Range of every input", path)


def tier_map(bits: np.ndarray, rows: Sequence[Row], sigmas: Sequence[float], path: Path) -> None:
    """The tier of every input at every step."""
    tiers = sorted(set(np.unique(bits).tolist()))

    def draw(figure: Figure, axes: Axes, values: np.ndarray) -> None:
        colours = ListedColormap([TIER_COLOURS.get(tier, OTHER_TIER) for tier in tiers])
        places = np.searchsorted(tiers, values)
        norm = BoundaryNorm(np.arange(len(tiers) + 1) - 0.5, len(tiers))
        image = axes.imshow(places, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
        bar = figure.colorbar(image, ticks=range(len(tiers)))
        bar.ax.set_yticklabels([f"A{tier}" for tier in tiers])

    heat_map(bits, rows, sigmas, draw, "Tier of every input", path)


def percentile_bands(
    layers: dict[str, dict[str, np.ndarray]], sigmas: Sequence[float], path: Path
) -> None:
    """p50, p99, p99.9 and the largest |x| over sigma, one panel a layer."""
    with plain_style():
        columns = 2
        count = -(-len(layers) // columns)
        figure = Figure(figsize=(WIDTH, 2.6 * count), layout="constrained")
        panels = figure.subplots(count, columns, squeeze=False, sharex=True).flat
        for axes, (name, curves) in zip(panels, layers.items(), strict=False):
            for (low, high), alpha in zip(BANDS, (0.55, 0.35, 0.18), strict=True):
                axes.fill_between(
                    sigmas, curves[low], curves[high], color="#33658a", alpha=alpha, linewidth=0,
                    label=f"{label(low)} to {label(high)}",
                )  # fmt: skip
            axes.plot(sigmas, curves["p50"], color="#1d3557", linewidth=1.2, label="median")
            axes.set_yscale("log")
            axes.set_title(name)
            axes.set_ylabel("|x|")
        used = list(panels_used(figure, len(layers)))
        for axes in used[-columns:]:
            axes.set_xlabel("σ")
        used[0].invert_xaxis()  # shared: noise on the left, as everywhere
        used[0].legend(fontsize=8, loc="best")
        save(figure, path)


def panels_used(figure: Figure, count: int) -> list[Axes]:
    for axes in figure.axes[count:]:
        axes.remove()
    return figure.axes[:count]


def label(percentile: str) -> str:
    return {"p50": "median", "p99": "p99", "p999": "p99.9", "p100": "largest"}[percentile]


@dataclass(frozen=True)
class Treatment:
    """One input's channel ranges (channels,) at one step, before and after shift and smoothing."""

    name: str
    before: tuple[np.ndarray, np.ndarray]  # least and largest value of each channel
    after: tuple[np.ndarray, np.ndarray]
    what: str  # such as "shift" or "smoothing 0.5"


def before_and_after(treatments: Sequence[Treatment], path: Path) -> None:
    """Range of each channel, in the order of the range before; one row an input."""
    with plain_style():
        figure = Figure(figsize=(WIDTH, 2.4 * len(treatments)), layout="constrained")
        grid = figure.subplots(len(treatments), 2, squeeze=False)
        for row, treatment in zip(grid, treatments, strict=True):
            low, high = treatment.before
            order = np.argsort(np.maximum(-low, high))
            pairs = (("before", treatment.before), (f"after {treatment.what}", treatment.after))
            for axes, (when, (least, most)) in zip(row, pairs, strict=True):
                limit = float(np.maximum(-least, most).max())
                axes.fill_between(
                    np.arange(len(order)), least[order], most[order], color="#33658a", step="mid",
                    linewidth=0,
                )  # fmt: skip
                axes.axhline(0, color="black", linewidth=0.5)
                axes.set_ylim(-1.08 * limit, 1.08 * limit)
                axes.set_title(f"{treatment.name}, {when}: ±{limit:.3g}")
        for axes in grid[-1]:
            axes.set_xlabel("channel, narrow to wide (before)")
        save(figure, path)
