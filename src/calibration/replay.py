"""Stored steps as inputs of the transformer, with guidance, any steps of any images together."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..sampling.schedule import TRAINING_STEPS
from .trajectories import Trajectories

Pair = tuple[int, int]  # image, step
Inputs = tuple[mx.array, mx.array, mx.array, mx.array]  # latent, text, pooled, timestep


def strided_pairs(trajectories: Trajectories, num_images: int, stride: int) -> list[Pair]:
    """Every stride-th step of the first images, image by image."""
    if not 1 <= num_images <= trajectories.num_images:
        raise UserError(
            f"--num-images {num_images} is not possible: {trajectories.folder} holds "
            f"{trajectories.num_images}; valid: 1 to {trajectories.num_images}"
        )
    if not 1 <= stride <= trajectories.num_steps:
        raise UserError(
            f"--stride {stride} is not possible with {trajectories.num_steps} steps; "
            f"valid: 1 to {trajectories.num_steps}"
        )
    steps = range(0, trajectories.num_steps, stride)
    return [(image, step) for image in range(num_images) for step in steps]


def transformer_inputs(
    trajectories: Trajectories, pairs: Sequence[Pair], dtype: mx.Dtype
) -> Inputs:
    """What the transformer was given at these steps: the prompts' rows, then the negatives'."""
    conditioning = trajectories.conditioning([image for image, _ in pairs], dtype)
    doubled = len(conditioning.text) // len(pairs)
    latent = np.stack([trajectories.latent(image, step) for image, step in pairs] * doubled)
    sigma = np.array([trajectories.sigmas[step] for _, step in pairs] * doubled, dtype=np.float32)
    timestep = mx.array(TRAINING_STEPS * sigma)
    return mx.array(latent).astype(dtype), conditioning.text, conditioning.pooled, timestep
