"""From what is known of an input to how it is quantized: scales for every step and tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .artifacts import LayerConfig
from .clip import PLAIN, Regions, clipped_scale
from .grid import fine_limit
from .segments import segmented_scales

COARSE_RATIOS = (2, 3, 4, 6, 8)  # a second region's steps over those of the first
ROUNDING = 0.49  # of a step that a value may lie beyond the last code and still round to it

Points = tuple[np.ndarray, np.ndarray]  # absolute values and their weights


@dataclass(frozen=True)
class ScaleTable:
    """One input's best scale for each step and tier, and its mean squared error."""

    tiers: tuple[int, ...]
    scale: np.ndarray  # (steps, tiers)
    error: np.ndarray  # (steps, tiers), in the input's squared unit
    shift: np.ndarray | None = None
    smoothing: np.ndarray | None = None
    regions: Regions = PLAIN

    def chosen(self, bits: Sequence[int]) -> np.ndarray:
        """(steps,) scales of the chosen tiers."""
        columns = [self.tiers.index(b) for b in bits]
        return self.scale[np.arange(len(columns)), columns]

    def level(self) -> float:
        """Mean over steps and tiers of the error's logarithm, to compare tables of one input."""
        return float(np.log(np.maximum(self.error, 1e-30)).mean())

    def layer(self, bits: Sequence[int], segments: int = 0, steady: float = 1.0) -> LayerConfig:
        """The layer at the chosen tiers; each tier's steps share at most `segments` scales."""
        bits = np.asarray(bits)
        scale = self.chosen(bits)
        if segments:
            for tier in np.unique(bits):
                here = bits == tier
                scale[here] = segmented_scales(scale[here], segments, steady)
        rounded = [float(np.float32(s)) for s in scale]
        coarse, sides = self.regions.coarse, self.regions.sides
        return LayerConfig(bits.tolist(), rounded, self.shift, self.smoothing, coarse, sides)


def largest_values(
    minimum: np.ndarray,
    maximum: np.ndarray,
    shift: np.ndarray | None = None,
    smoothing: np.ndarray | None = None,
) -> np.ndarray:
    """(steps,) largest |x - shift| / smoothing, exact, from (steps, channels) extremes."""
    offset = 0.0 if shift is None else shift
    width = np.maximum(offset - minimum, maximum - offset)
    return (width if smoothing is None else width / smoothing).max(axis=1)


def scale_table(
    points: Sequence[Points],
    largest: np.ndarray,
    tiers: tuple[int, ...],
    shift: np.ndarray | None = None,
    smoothing: np.ndarray | None = None,
    regions: Regions = PLAIN,
    lowest: np.ndarray | None = None,
) -> ScaleTable:
    """A clip search for every step and tier over the steps' distributions.

    `lowest`, the least value of each step, is what fine codes must reach where the coarse ones
    have one side.
    """
    found = []
    for index, (step, top) in enumerate(zip(points, largest, strict=True)):
        depth = 0.0 if lowest is None else max(0.0, -float(lowest[index]))
        floors = [depth / (fine_limit(bits) + ROUNDING) for bits in tiers]
        found.append(
            [
                clipped_scale(*step, top, bits, regions, floor)
                for bits, floor in zip(tiers, floors, strict=True)
            ]
        )
    table = np.array(found)
    return ScaleTable(tiers, table[..., 0], table[..., 1], shift, smoothing, regions)


def two_region_table(
    points: Sequence[Points],
    largest: np.ndarray,
    tiers: tuple[int, ...],
    smoothing: np.ndarray | None = None,
    lowest: np.ndarray | None = None,
) -> ScaleTable:
    """Scales for two regions of codes, with the ratio that has the least error over all steps.

    With `lowest` the input is bounded below, as GELU's is: its fine codes reach there, and the
    coarse ones go upwards only. No shift is needed, the fine codes are where the mass is.
    """
    sides = 2 if lowest is None else 1
    tables = [
        scale_table(points, largest, tiers, None, smoothing, Regions(coarse, sides), lowest)
        for coarse in COARSE_RATIOS
    ]
    return min(tables, key=ScaleTable.level)


def one_shift(shift: np.ndarray | None) -> np.ndarray | None:
    """One shift for all steps from (steps, channels) ones: a bias that no step changes."""
    return None if shift is None else shift.mean(axis=0, dtype=np.float64).astype(np.float32)
