"""Streams to spread work over: on a CPU, only matrix products use more than one core a stream."""

from __future__ import annotations

import os
from functools import lru_cache

import mlx.core as mx

MOST = 4  # streams; each is a thread


@lru_cache
def lanes() -> tuple[mx.Stream, ...]:
    """One a core on a CPU; elsewhere the default one alone."""
    here = mx.default_device()
    if here != mx.Device(mx.cpu):
        return (mx.default_stream(here),)
    return tuple(mx.new_stream(here) for _ in range(min(os.cpu_count() or 1, MOST)))
