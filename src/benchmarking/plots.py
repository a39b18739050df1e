"""The plot: a step's time and the memory of every row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..report.plots import WIDTH, plain_style, save
from .rows import FLOAT

COLOURS = {"floats": "#8d99ae", "quantized": "#33658a", "modulated": "#c8553d"}
ROOM = {"times": 1.5, "memory": 1.25}  # of an axis, for the numbers behind its bars


def plot_rows(data: dict[str, Any], path: Path) -> None:
    """Bars from top to bottom in the order of the rows: time on the left, memory on the right."""
    rows = data["rows"]
    with plain_style():
        height = 1.4 + 0.3 * len(rows)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        times, memory = figure.subplots(1, 2, sharey=True)
        draw_times(times, rows)
        draw_memory(memory, rows)
        times.set_yticks(range(len(rows)), [row["name"] for row in rows])
        times.invert_yaxis()
        for axes in (times, memory):
            axes.spines.right.set_visible(False)
        for label, colour in COLOURS.items():
            if any(group(row) == label for row in rows):
                memory.bar(0, 0, color=colour, label=label)
        figure.legend(loc="outside lower right", ncols=len(COLOURS), fontsize=8, frameon=False)
        figure.suptitle(f"{data['model']['name']} on {data['machine']['device']}", fontsize=10)
        save(figure, path)


def group(row: dict[str, Any]) -> str:
    if row["modulated"]:
        return "modulated"
    return "floats" if row["kind"] == FLOAT else "quantized"


def draw_times(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Median and middle half; a line where the first row is."""
    longest = 0.0
    for place, row in enumerate(rows):
        middle = 1e3 * row["step_seconds"]["median"]
        low, high = (1e3 * bound for bound in row["step_seconds"]["quartiles"])
        axes.barh(place, middle, color=COLOURS[group(row)], height=0.7)
        axes.plot([low, high], [place, place], color="black", linewidth=1)
        text = f" {number(middle)}  ({row['ratio']['median']:.2f}×)"
        axes.text(max(middle, high), place, text, va="center", fontsize=8)
        longest = max(longest, middle, high)
    axes.axvline(1e3 * rows[0]["step_seconds"]["median"], color="black", linewidth=0.6, alpha=0.6)
    axes.set_xlim(0, longest * ROOM["times"])
    axes.set_title("ms a step: median and middle half")


def draw_memory(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """What is held all the time, and paler what a step takes on top."""
    longest = max(row["peak_bytes"] for row in rows)
    unit, name = (1e9, "GB") if longest >= 1e9 else (1e6, "MB")
    for place, row in enumerate(rows):
        held, peak = row["held_bytes"] / unit, row["peak_bytes"] / unit
        colour = COLOURS[group(row)]
        axes.barh(place, held, color=colour, height=0.7)
        axes.barh(place, peak - held, left=held, color=colour, alpha=0.4, height=0.7)
        axes.text(peak, place, f" {number(peak)}", va="center", fontsize=8)
    axes.set_xlim(0, longest / unit * ROOM["memory"])
    axes.set_title(f"{name}: held, and peak (pale)")


def number(value: float) -> str:
    """Three digits, and all that stand before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
