"""Classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..errors import UserError

# (latent, text tokens, pooled text, timestep) to velocity: a transformer's call. The timestep has
# one entry a row, or a single one for all.
Model = Callable[[mx.array, mx.array, mx.array, mx.array], mx.array]


def uses_guidance(cfg_weight: float) -> bool:
    """Whether the batch is doubled: weights 0 (off) and 1 need the prompt's own velocity only."""
    if not cfg_weight >= 0:
        raise UserError(f"the guidance weight must be at least 0, got {cfg_weight}")
    return cfg_weight not in (0, 1)


def combined(velocity: mx.array, weight: float) -> mx.array:
    """The guided velocity of the prompts' and, behind them, the negative prompts' own."""
    prompt, negative = mx.split(velocity, 2)
    return negative + weight * (prompt - negative)


def guided(
    model: Model,
    latent: mx.array,
    sigma: mx.array,
    text: mx.array,
    pooled: mx.array,
    weight: float,
    combine: Callable[[mx.array, float], mx.array] = combined,
) -> mx.array:
    """Velocity of the (batch, …) latent at one sigma, or at one a row.

    With guidance, text and pooled hold twice the batch: the prompts, then the negative prompts.
    The model computes in the text's dtype; the guidance itself, a difference, in float32.
    """
    doubled = uses_guidance(weight)
    if doubled:
        latent = mx.concatenate([latent, latent])
        sigma = mx.concatenate([sigma, sigma]) if sigma.ndim else sigma
    if len(text) != len(latent):
        raise ValueError(f"{len(text)} rows of text for {len(latent)} latents")
    timestep = (1000 * sigma).reshape(-1)  # one that is said to be all rows' saves layers work
    velocity = model(latent.astype(text.dtype), text, pooled, timestep).astype(mx.float32)
    return combine(velocity, weight) if doubled else velocity
