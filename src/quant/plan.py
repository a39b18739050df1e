"""From what is known of an input to how it is quantized: scales for every step and tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .artifacts import LayerConfig
from .clip import PLAIN, Regions, clipped_scale
from .grid import fine_limit
from .segments import segmented_scales

COARSE_RATIOS = (2, 3, 4, 6, 8)  # a second region's steps over those of the first
ROUNDING = 0.49  # of a step that a value may lie beyond the last code and still round to it
BYTE_LIMIT = 127  # the largest code that a kernel of 8-bit integers takes

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

    def level(self, bits: Sequence[int]) -> float:
        """Mean over the steps of the error's logarithm, to compare tables of one input."""
        columns = [self.tiers.index(b) for b in bits]
        errors = self.error[np.arange(len(columns)), columns]
        return float(np.log(np.maximum(errors, 1e-30)).mean())

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


@dataclass(frozen=True)
class InputScales:
    """One input's layouts of codes, each with its scales; the tiers decide between them."""

    tables: tuple[ScaleTable, ...]  # the first, of one region, is always possible
    bytes_only: bool = False  # whether codes must fit into a byte, or only their tier's bits

    def best(self, bits: Sequence[int]) -> ScaleTable:
        """The table with the least error at these tiers, one a step."""
        widest = int(max(bits))
        possible = [
            table
            for table in self.tables
            if not self.bytes_only or table.regions.largest_code(widest) <= BYTE_LIMIT
        ]
        return min(possible, key=lambda table: table.level(bits))

    @cached_property
    def error(self) -> np.ndarray:
        """(steps, tiers) mean squared error where all steps are of one tier."""
        tiers = self.tables[0].tiers
        steps = len(self.tables[0].scale)
        best = [self.best([tier] * steps) for tier in tiers]
        return np.stack([table.error[:, i] for i, table in enumerate(best)], axis=1)

    def layer(self, bits: Sequence[int], segments: int = 0, steady: float = 1.0) -> LayerConfig:
        """The layer at the chosen tiers, in the layout that suits them."""
        return self.best(bits).layer(bits, segments, steady)


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

    Where coarse codes have one side only, `lowest`, the least value of each step, is what the fine
    ones must reach.
    """
    one_sided = lowest is not None and regions.coarse > 1 and regions.sides == 1
    found = []
    for index, (step, top) in enumerate(zip(points, largest, strict=True)):
        depth = max(0.0, -float(lowest[index])) if one_sided else 0.0
        floors = [depth / (fine_limit(bits) + ROUNDING) for bits in tiers]
        found.append(
            [
                clipped_scale(*step, top, bits, regions, floor)
                for bits, floor in zip(tiers, floors, strict=True)
            ]
        )
    table = np.array(found)
    return ScaleTable(tiers, table[..., 0], table[..., 1], shift, smoothing, regions)


def two_region_layouts(post_gelu: bool) -> list[Regions]:
    """What is tried. What GELU gives is bounded below: its fine codes reach there, and the coarse
    ones go upwards only. That needs no shift, the fine codes are where the mass is."""
    return [Regions(coarse, 1 if post_gelu else 2) for coarse in COARSE_RATIOS]


def one_shift(shift: np.ndarray | None) -> np.ndarray | None:
    """One shift for all steps from (steps, channels) ones: a bias that no step changes."""
    return None if shift is None else shift.mean(axis=0, dtype=np.float64).astype(np.float32)
