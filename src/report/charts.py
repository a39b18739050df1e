"""Where the lines, bars and cells of the page lie, in per cent: the template only draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .content import Rung, TierMap

MOST_TICKS = 6  # that stay legible side by side on a phone


@dataclass(frozen=True)
class Tick:
    place: float  # per cent from the left or from the bottom
    label: str


@dataclass(frozen=True)
class Line:
    """One series: where it goes on a canvas of 100 x 100 with y downwards, and its numbers."""

    name: str
    path: str  # of SVG
    values: Sequence[float]


@dataclass(frozen=True)
class Chart:
    lines: Sequence[Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    x_label: str
    x_values: Sequence[str]  # as they are to be read, one for each value of a line


@dataclass(frozen=True)
class Bar:
    """A rung of the ladder; places in per cent of the widest."""

    name: str
    value: str
    interval: str
    start: float
    width: float
    low: float
    high: float


@dataclass(frozen=True)
class TierGroup:
    """All inputs of one kind: a path of SVG for each tier, of cells one unit wide and high."""

    kind: str
    blocks: str
    rows: int
    cells: Mapping[int, str]


@dataclass(frozen=True)
class TierChart:
    groups: Sequence[TierGroup]
    steps: int
    shares: Mapping[int, str]  # of all inputs and steps, by tier
    x_ticks: Sequence[Tick]


def line_chart(
    series: Mapping[str, Sequence[float]], x: Sequence[float], x_label: str
) -> Chart | None:
    """Series of dB over whole numbers or sigmas, rising or falling; None where there is nothing."""
    finite = [v for values in series.values() for v in values if math.isfinite(v)]
    if not finite or not len(x):
        return None
    whole = all(float(value).is_integer() for value in x)
    ticks = round_ticks(min(finite), max(finite))
    low, high = ticks[0], ticks[-1]
    across = [spread(value, x[0], x[-1]) for value in x]
    lines = [
        Line(name, svg_path(across, [100 - spread(v, low, high) for v in values]), values)
        for name, values in series.items()
    ]
    marks = round_ticks(min(x), max(x), finest=1 if whole else 0)
    return Chart(
        lines,
        [Tick(spread(t, x[0], x[-1]), f"{t:g}") for t in marks if min(x) <= t <= max(x)],
        [Tick(spread(t, low, high), f"{t:g}") for t in ticks],
        x_label,
        [f"{value:g}" if whole else f"{value:.3f}" for value in x],
    )


def spread(value: float, start: float, end: float) -> float:
    """Per cent of the way from start to end."""
    return 50.0 if end == start else 100 * (value - start) / (end - start)


def svg_path(xs: Sequence[float], ys: Sequence[float]) -> str:
    """Lines from point to point; a point that is not finite leaves a gap, a lone one is a dot."""
    parts, pen_down = [], False
    for x, y in zip(xs, ys, strict=False):
        if math.isfinite(y):
            # A line of no length: with round ends it marks the point itself.
            parts.append(f"{'L' if pen_down else 'M'}{x:.2f} {y:.2f}h0")
        pen_down = math.isfinite(y)
    return "".join(parts)


def round_ticks(low: float, high: float, finest: float = 0.0) -> list[float]:
    """Round numbers around low and high, about MOST_TICKS and `finest` or more apart."""
    width = max(high - low, 1e-9, abs(high) * 1e-6)
    unit = 10 ** math.floor(math.log10(width / MOST_TICKS))
    step = next(m * unit for m in (1, 2, 5, 10, 20) if width / (m * unit) <= MOST_TICKS - 1)
    step = max(step, finest)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * i, 10) for i in range(first, max(last, first + 1) + 1)]


def spaced(count: int) -> range:
    """Some of range(count), at most MOST_TICKS, evenly from the first on."""
    return range(0, count, max(1, math.ceil(count / MOST_TICKS)))


def ladder_bars(rungs: Sequence[Rung]) -> list[Bar]:
    """Bars from 0 dB, to the right where it is positive."""
    bounds = [b for r in rungs for b in (r.low, r.high, r.db) if math.isfinite(b)]
    low, high = min(0.0, *bounds, 0.0), max(0.0, *bounds, 1e-9)

    def place(value: float) -> float:
        return spread(min(max(value, low), high), low, high)

    return [
        Bar(
            rung.name,
            f"{rung.db:.1f} dB",
            f"{rung.low:.1f} to {rung.high:.1f}",
            place(min(0.0, rung.db)),
            abs(place(rung.db) - place(0.0)),
            place(rung.low),
            place(rung.high),
        )
        for rung in rungs
    ]


def tier_chart(tiers: TierMap) -> TierChart:
    """Inputs grouped by kind of layer, in the order of the paths; equal rows of q, k, v as one."""
    kinds: dict[str, dict[tuple[int, bytes], np.ndarray]] = {}
    bits = np.asarray(tiers.bits)
    for path, row in zip(tiers.paths, bits, strict=True):
        kind, block = kind_and_block(path)
        kinds.setdefault(kind, {})[block, row.tobytes()] = row
    groups = []
    for kind, found in sorted(kinds.items()):
        order = sorted(found, key=lambda key: key[0])
        first, last = order[0][0], order[-1][0]
        blocks = f"block {first}" if first == last else f"blocks {first} to {last}"
        cells = tier_cells(np.stack([found[key] for key in order]))
        groups.append(TierGroup(kind, blocks, len(order), cells))
    shares = {int(t): f"{np.mean(bits == t):.0%}" for t in np.unique(bits)}
    steps = len(tiers.sigmas)
    ticks = [Tick(100 * (i + 0.5) / steps, f"{tiers.sigmas[i]:.2f}") for i in spaced(steps)]
    return TierChart(groups, steps, shares, ticks)


def kind_and_block(path: str) -> tuple[str, int]:
    """Stream and role of the linear with that path, and the number of its block."""
    parts = path.split(".")
    stream = "text" if any(part.startswith("text_") for part in parts) else "image"
    role = "qkv" if parts[-1] in ("q_proj", "k_proj", "v_proj") else parts[-1]
    second = " (second)" if "attn2" in parts else ""
    return f"{stream} {role}{second}", next((int(p) for p in parts if p.isdigit()), 0)


def tier_cells(bits: np.ndarray) -> dict[int, str]:
    """By tier the outlines of all runs of it, row by row."""
    cells: dict[int, list[str]] = {}
    for y, row in enumerate(bits):
        starts = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist()]
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            width = end - start
            cells.setdefault(int(row[start]), []).append(f"M{start} {y}h{width}v1h-{width}z")
    return {tier: "".join(cells[tier]) for tier in sorted(cells)}
