"""Attention for learning, by whatever is fastest forward and backward.

On a GPU that is MLX's fused kernels, which know 16-bit floats only. Forward it is computed in
float16, in which the 16-bit model's own attention is. Backward in bfloat16: gradients of a mean
over millions of values would vanish in float16, and a rounding of one part in 256 is far below what
a minibatch leaves uncertain. On a CPU it is float32 with a softmax through `power`, which takes
half the time of MLX's own, through `exp`.
"""

from __future__ import annotations

import math

import mlx.core as mx

FUSED_TOKENS = 128  # MLX fuses the backward pass of multiples of it only


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)


@mx.custom_function
def fused_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Over (batch, heads, tokens, head_dim) float32, in 16 bits within."""
    return attention(*(x.astype(mx.float16) for x in (q, k, v))).astype(mx.float32)


@fused_attention.vjp
def fused_attention_vjp(
    primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, ...]:
    tokens = cotangent.shape[2]
    # Queries that nothing depends on: they change no gradient.
    more = [(0, 0), (0, 0), (0, -tokens % FUSED_TOKENS), (0, 0)]
    q, k, v, pull = (x.astype(mx.bfloat16) for x in (*primals, cotangent))
    _, (of_q, of_k, of_v) = mx.vjp(attention, [mx.pad(q, more), k, v], [mx.pad(pull, more)])
    return tuple(x.astype(mx.float32) for x in (of_q[:, :, :tokens], of_k, of_v))


@mx.custom_function
def softmax_of_power(scores: mx.array) -> mx.array:
    """Over the last axis."""
    largest = mx.max(scores, axis=-1, keepdims=True)
    weights = mx.power(mx.array(math.e, dtype=scores.dtype), scores - largest)
    return weights / mx.sum(weights, axis=-1, keepdims=True)


@softmax_of_power.vjp
def softmax_of_power_vjp(_: mx.array, cotangent: mx.array, found: mx.array) -> mx.array:
    pulled = cotangent * found
    return pulled - found * mx.sum(pulled, axis=-1, keepdims=True)


def plain_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    return softmax_of_power((q * q.shape[-1] ** -0.5) @ k.swapaxes(-1, -2)) @ v


def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Heads merged: (batch, tokens, hidden)."""
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    attended = plain_attention(q, k, v) if on_cpu else fused_attention(q, k, v)
    return attended.transpose(0, 2, 1, 3).flatten(2)
