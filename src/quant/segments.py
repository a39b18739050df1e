"""Few scales for many steps: the optimal cut of a curve into runs of one level."""

from __future__ import annotations

import numpy as np

from ..errors import UserError


def run_costs(curve: np.ndarray) -> np.ndarray:
    """[i, j]: squared deviations from their mean of the points i … j - 1."""
    n = len(curve)
    sums = np.concatenate([[0.0], np.cumsum(curve)])
    squares = np.concatenate([[0.0], np.cumsum(curve**2)])
    first, end = np.arange(n)[:, None], np.arange(n + 1)[None, :]
    length = np.maximum(end - first, 1)
    total = sums[end] - sums[first]
    costs = squares[end] - squares[first] - total**2 / length
    return np.where(end > first, np.maximum(costs, 0), np.inf)


def cut(curve: np.ndarray, segments: int) -> list[int]:
    """Where the runs begin (the first at 0): at most so many, least squared deviation in all."""
    if segments < 1:
        raise UserError(f"--segments must be at least 1, got {segments}")
    curve = np.asarray(curve, dtype=np.float64) - np.mean(curve)  # keeps differences exact
    n = len(curve)
    costs = run_costs(curve)
    best = np.append(0.0, np.full(n, np.inf))  # of the first j points, with the runs so far
    starts = []
    for _ in range(min(segments, n)):
        options = best[:n, None] + costs
        starts.append(np.append(0, options.argmin(axis=0)[1:]))
        best = np.append(np.inf, options.min(axis=0)[1:])
    begins, end = [], n
    for row in reversed(starts):
        end = int(row[end])
        begins.append(end)
    return sorted(begins)


def segmented_scales(scales: np.ndarray, segments: int, steady: float) -> np.ndarray:
    """The scales with one value a run, the geometric mean.

    A curve whose largest and smallest value differ by less than the factor `steady` is one run.
    """
    scales = np.asarray(scales, dtype=np.float64)
    logs = np.log(scales)
    if logs.max() - logs.min() < np.log(steady):
        return np.full(len(scales), np.exp(logs.mean()))
    begins = cut(logs, segments)
    ends = [*begins[1:], len(logs)]
    levels = [np.exp(logs[a:b].mean()) for a, b in zip(begins, ends, strict=True)]
    return np.repeat(levels, np.diff([*begins, len(logs)]))
