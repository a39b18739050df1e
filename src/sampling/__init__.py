"""From noise to a latent: sigma schedule, samplers, guidance, callbacks."""

from .callbacks import (
    AfterCallback,
    BeforeCallback,
    Callback,
    InterruptCallback,
    Step,
    StepCallback,
)
from .guidance import combined, guided, uses_guidance
from .loop import SAMPLERS, denoise
from .noise import Noise
from .schedule import sd3_sigmas, shifted

__all__ = [
    "SAMPLERS",
    "AfterCallback",
    "BeforeCallback",
    "Callback",
    "InterruptCallback",
    "Noise",
    "Step",
    "StepCallback",
    "combined",
    "denoise",
    "guided",
    "sd3_sigmas",
    "shifted",
    "uses_guidance",
]
