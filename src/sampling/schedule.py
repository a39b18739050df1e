"""Noise levels: sigma runs from 1, pure noise, to 0, the clean latent."""

from __future__ import annotations

import numpy as np

from ..errors import UserError

TRAINING_STEPS = 1000  # a timestep is sigma in thousandths


def shifted(sigma: np.ndarray | float, shift: float) -> np.ndarray | float:
    """Moves a schedule towards noise; shift 1 leaves it alone."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sd3_sigmas(num_steps: int, shift: float = 3.0) -> np.ndarray:
    """SD3's schedule: num_steps + 1 float32 sigmas, falling from 1, the last one 0.

    The steps are spaced evenly between the largest and the smallest sigma of training, which is
    shifted already, and then shifted as a whole: the published sampler does it so.
    """
    if num_steps < 1:
        raise UserError(f"the number of steps must be at least 1, got {num_steps}")
    if not shift > 0:
        raise UserError(f"the schedule's shift must be above 0, got {shift}")
    smallest = shifted(1 / TRAINING_STEPS, shift)
    spaced = np.linspace(1.0, smallest, num_steps)
    return np.append(shifted(spaced, shift), 0.0).astype(np.float32)
