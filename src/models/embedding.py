"""What enters the transformer: patches, their positions, timesteps and pooled text, embedded."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from .configs import MMDiTConfig

MAX_PERIOD = 10000.0


def timestep_features(timestep: mx.array, size: int) -> mx.array:
    """Cosines, then sines, of (batch,) timesteps: (batch, size), always float32.

    Sixteen bits cannot hold the phases: the features would be off by up to 0.4 in float16.
    """
    half = size // 2
    frequencies = mx.exp(-math.log(MAX_PERIOD) / half * mx.arange(half, dtype=mx.float32))
    phase = timestep.astype(mx.float32)[:, None] * frequencies
    return mx.concatenate([mx.cos(phase), mx.sin(phase)], axis=-1)


class PatchEmbedding(nn.Module):
    """Cuts the latent into patches, row by row, and projects each to the hidden size."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(
            config.latent_channels, config.hidden, config.patch, stride=config.patch
        )

    def __call__(self, latent: mx.array) -> mx.array:
        return self.proj(latent).flatten(1, 2)


class PositionEmbedding(nn.Module):
    """A learned square grid of positions; a smaller picture takes its centre."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self._side = config.position_size
        self.pos_embed = nn.Embedding(config.position_size**2, config.hidden)

    def __call__(self, rows: int, columns: int) -> mx.array:
        top, left = (self._side - rows) // 2, (self._side - columns) // 2
        grid = self.pos_embed.weight.reshape(self._side, self._side, -1)
        return grid[top : top + rows, left : left + columns].flatten(0, 1)


class Embedder(nn.Module):
    """Two linears with SiLU between: pooled text or timestep features to the hidden size."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def __call__(self, x: mx.array) -> mx.array:
        return self.mlp(x)
