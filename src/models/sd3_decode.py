"""A VAE decoder's work in strips of rows, layer by layer: the same picture in little memory.

Tiles that are decoded each by itself and blended do not agree in tone, since every norm would see
its tile alone. Here each norm takes its statistics from the whole picture, and each convolution
sees the neighbouring strips' rows, so that what comes out is what the decoder makes in one piece,
but for the order of sums. The decoder is DiffusionKit's `VAEDecoder`, or any of its structure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

STRIP_ROWS = 4  # of the latent
QUERIES = 1024  # of the attention in the middle, at a time

Strips = list[mx.array]  # (1, rows, width, channels) each, from top to bottom
Pointwise = Callable[[mx.array], mx.array]


def decode_in_strips(decoder: Any, latent: mx.array, rows: int = STRIP_ROWS) -> mx.array:
    """One latent (1, height, width, channels) to what the decoder gives of it."""
    x = convolved(cut(latent, rows), decoder.conv_in)
    first, attention, second = decoder.mid_blocks
    resnet(x, first)
    x = cut(attended(mx.concatenate(x, axis=1), attention), rows)
    resnet(x, second)
    for block in reversed(decoder.up_blocks):
        for layer in block.resnets:
            resnet(x, layer)
        if "upsample" in block:
            x = upsampled(x, block.upsample)
    x = convolved(x, decoder.conv_out, activation(x, decoder.conv_norm_out))
    return mx.concatenate(x, axis=1)


def cut(x: mx.array, rows: int) -> Strips:
    return [x[:, i : i + rows] for i in range(0, x.shape[1], rows)]


def resnet(x: Strips, block: Any) -> None:
    """In place, so that at no time there are three sets of strips."""
    y = convolved(x, block.conv1, activation(x, block.norm1))
    act = activation(y, block.norm2)
    for i in range(len(x)):
        kept = block.conv_shortcut(x[i]) if "conv_shortcut" in block else x[i]
        x[i] = kept + convolve(with_neighbours(y, i, act), block.conv2)
        mx.eval(x[i])
        if i:
            y[i - 1] = y[i - 1][:, -1:] + 0  # its last row is all that is still read


def convolved(x: Strips, conv: nn.Conv2d, act: Pointwise | None = None) -> Strips:
    done = []
    for i in range(len(x)):
        done.append(convolve(with_neighbours(x, i, act), conv))
        mx.eval(done[-1])
    return done


def upsampled(x: Strips, conv: nn.Conv2d) -> Strips:
    """Every pixel four times, then the convolution."""
    done = []
    for i in range(len(x)):
        rows = mx.repeat(mx.repeat(with_neighbours(x, i), 2, axis=1), 2, axis=2)
        done.append(convolve(rows[:, 1:-1], conv))
        mx.eval(done[-1])
    return done


def convolve(rows: mx.array, conv: nn.Conv2d) -> mx.array:
    """3 x 3; the rows above and below are there, the columns beside are zeros."""
    return mx.conv2d(rows, conv.weight, padding=(0, 1)) + conv.bias


def with_neighbours(x: Strips, i: int, act: Pointwise | None = None) -> mx.array:
    """A strip between the rows next to it, which are zeros beyond the picture."""
    above, below = i > 0, i + 1 < len(x)
    parts = [x[i - 1][:, -1:]] if above else []
    parts += [x[i]] + ([x[i + 1][:, :1]] if below else [])
    rows = mx.concatenate(parts, axis=1)
    if act is not None:
        rows = act(rows)  # before the zeros, which it would change
    return mx.pad(rows, [(0, 0), (0 if above else 1, 0 if below else 1), (0, 0), (0, 0)])


def activation(x: Strips, norm: nn.GroupNorm) -> Pointwise:
    """The norm, by the statistics of all strips, and SiLU."""
    normalized = normalization(x, norm)
    return lambda rows: nn.silu(normalized(rows))


def normalization(x: Strips, norm: nn.GroupNorm) -> Pointwise:
    """A group norm as one factor and one summand a channel, float32."""
    groups, channels = norm.num_groups, x[0].shape[-1]
    size = sum(math.prod(rows.shape) for rows in x) // groups

    def total(value: Pointwise) -> mx.array:
        sums = []
        for rows in x:
            grouped = rows.astype(mx.float32).reshape(-1, groups, channels // groups)
            sums.append(value(grouped).sum(axis=(0, 2)))
            mx.eval(sums[-1])
        return sum(sums) / size

    mean = total(lambda grouped: grouped)
    variance = total(lambda grouped: mx.square(grouped - mean[:, None]))
    factor = mx.repeat(mx.rsqrt(variance + norm.eps), channels // groups) * norm.weight
    summand = norm.bias - mx.repeat(mean, channels // groups) * factor
    mx.eval(factor, summand)
    return lambda rows: (rows.astype(mx.float32) * factor + summand).astype(rows.dtype)


def attended(x: mx.array, block: Any) -> mx.array:
    """Attention of every pixel to every other, some queries at a time."""
    _, height, width, channels = x.shape
    y = normalization([x], block.group_norm)(x).reshape(height * width, channels)
    keys, values = block.key_proj(y), block.value_proj(y)
    done = []
    for i in range(0, height * width, QUERIES):
        queries = block.query_proj(y[i : i + QUERIES]) / math.sqrt(channels)
        shares = mx.softmax(queries @ keys.T, axis=-1, precise=True)
        done.append(block.out_proj(shares @ values))
        mx.eval(done[-1])
    return x + mx.concatenate(done).reshape(x.shape)
