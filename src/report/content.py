"""What a report is about: plain numbers and pictures, wherever they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class PicturePair:
    """One prompt, drawn by the 16-bit model and by the quantized one from the same noise."""

    prompt: str
    seed: int
    reference: np.ndarray  # 8 bits, (height, width, 3)
    quantized: np.ndarray
    figures: Mapping[str, str]  # such as {"PSNR": "27.1 dB"}, as they are to be read


@dataclass(frozen=True)
class Rung:
    """One row of the ladder: what this much of the method gives, in dB of the guided velocity."""

    name: str
    db: float
    low: float  # of its 95 % interval
    high: float


@dataclass(frozen=True)
class TierMap:
    """The bits of every input at every step."""

    paths: Sequence[str]
    sigmas: Sequence[float]
    bits: np.ndarray  # (paths, sigmas)


@dataclass(frozen=True)
class BlockErrors:
    """Signal to error in dB, one value a block, of every rung that was measured there."""

    by_rung: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Report:
    """Everything that the page shows; a part that was not measured is left empty."""

    title: str
    settings: Mapping[str, str]  # what was run, versions and hashes, in reading order
    notes: Sequence[str] = ()  # what the reader must be told
    pairs: Sequence[PicturePair] = ()
    summary: Mapping[str, Sequence[str]] = field(default_factory=dict)  # figure: median, worst, ...
    summary_columns: Sequence[str] = ()
    ladder: Sequence[Rung] = ()
    tiers: TierMap | None = None
    blocks: BlockErrors | None = None  # from the weight track
    block_db: Mapping[str, Sequence[float]] = field(default_factory=dict)  # stream: dB by block
    step_db: Mapping[str, Sequence[float]] = field(default_factory=dict)  # what: dB by sigma
    sigmas: Sequence[float] = ()  # of step_db
    costs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # figure: model: value
    highlights: Mapping[str, str] = field(default_factory=dict)  # what: figure, a few for the top
