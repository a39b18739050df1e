"""Seconds, taken in turns: what makes the machine busy for one makes it busy for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

Result = TypeVar("Result")


def in_turns(
    calls: Mapping[str, Callable[[], Result]], rounds: int, warm_up: int = 0
) -> dict[str, list[Result]]:
    """What each call gives, one of each in every round; what the first `warm_up` rounds give does
    not count."""
    found: dict[str, list[Result]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            result = call()
            if number >= warm_up:
                found[name].append(result)
    return found


def seconds_of(call: Callable[[], Any]) -> Callable[[], float]:
    """A call that computes the array, or all of several, and gives how long that took."""

    def timed() -> float:
        start = time.perf_counter()
        mx.eval(call())
        return time.perf_counter() - start

    return timed


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, the middle half, and the least."""
    low, middle, high = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": middle, "quartiles": [low, high], "least": float(min(values))}


def ratios(values: Sequence[float], first: Sequence[float]) -> dict[str, Any]:
    """How many times as long as the first took in the same round."""
    return spread((np.asarray(values) / np.asarray(first)).tolist())


def refusal_of(call: Callable[[], Any]) -> str | None:
    """Why MLX cannot compute this here, on one line; None if it can."""
    try:
        call()
    except RuntimeError as error:
        return " ".join(str(error).split())
    return None
