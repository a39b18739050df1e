"""Seeded noise, the same on every machine and in every batch."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..errors import UserError

LARGEST_SEED = 2**32 - 1


class Noise:
    """Draws standard normal latents, one stream per seed.

    NumPy's legacy generator and its channels-first order are DiffusionKit's, so a seed means the
    same picture there; a generator of our own leaves NumPy's global state alone.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        for seed in seeds:
            if not 0 <= seed <= LARGEST_SEED:
                raise UserError(f"seed {seed} is out of range; valid: 0 to {LARGEST_SEED}")
        self._streams = [np.random.RandomState(seed) for seed in seeds]

    def draw(self, height: int, width: int, channels: int) -> mx.array:
        """The next (seeds, height, width, channels) of noise, float32."""
        drawn = np.stack([stream.randn(channels, height, width) for stream in self._streams])
        return mx.array(drawn.astype(np.float32).transpose(0, 2, 3, 1))
