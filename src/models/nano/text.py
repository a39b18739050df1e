"""nano's text encoder: a caption's words to token embeddings, in context, and a pooled one."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class TextConfig:
    vocabulary: int = 64
    max_words: int = 32
    dim: int = 128
    layers: int = 2
    heads: int = 4


class TextEncoder(nn.Module):
    """(batch, words) ids, 0 for padding, to (batch, words, dim) and pooled (batch, dim).

    Attention between the words binds a colour to its shape: with bare word embeddings two-object
    pictures swap their colours.
    """

    def __init__(self, config: TextConfig | None = None) -> None:
        super().__init__()
        config = config or TextConfig()
        self.config = config
        self.words = nn.Embedding(config.vocabulary, config.dim)
        self.positions = nn.Embedding(config.max_words, config.dim)
        self.layers = [
            nn.TransformerEncoderLayer(
                config.dim, config.heads, 4 * config.dim, activation=nn.gelu, norm_first=True
            )
            for _ in range(config.layers)
        ]
        self.norm = nn.LayerNorm(config.dim)
        self.pool = nn.Linear(config.dim, config.dim)

    def __call__(self, ids: mx.array) -> tuple[mx.array, mx.array]:
        present = ids != 0
        x = self.words(ids) + self.positions.weight[: ids.shape[1]]
        # The most negative number that float16 holds hides padding without making NaN.
        mask = mx.where(present, 0.0, -65504.0).astype(x.dtype)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x)
        weight = present.astype(x.dtype)[..., None]
        pooled = (x * weight).sum(axis=1) / mx.maximum(weight.sum(axis=1), 1)
        return x, self.pool(pooled)
