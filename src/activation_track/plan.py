"""How analyze_activations comes from statistics to tiers, scales and factors, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..calibration import histogram
from ..calibration.activations import STATISTICS_NAME, ActivationStatistics, InputStatistics
from ..calibration.sensitivity import Samples, sampled_rows, spread_pairs
from ..calibration.statistics import is_post_gelu
from ..calibration.trajectories import open_with_pipeline
from ..models.load import Model
from ..models.mmdit import MMDiT
from ..models.paths import block_linears, module_at, replaced, values_of
from ..quant import smooth
from ..quant.artifacts import LayerConfig, QuantConfig
from ..quant.clip import PLAIN, Regions
from ..quant.plan import (
    InputScales,
    Points,
    ScaleTable,
    largest_values,
    one_shift,
    scale_table,
    two_region_layouts,
)
from ..quant.simulate import CurrentStep, SimulatedLinear, static_quantizer
from ..quant.tiers import Range, Thresholds, average_bits, frontier, has_spikes, threshold_tier
from ..store import require_match
from .options import Options

TOKENS_SAMPLED = 64  # of each stored step, for the smoothing's search
STEADY = 1.1  # largest over smallest scale below which a layer needs one only

Bits = dict[str, np.ndarray]  # per input, one tier a step


@dataclass
class Plan:
    """Everything that is known of a model's inputs, and what was decided so far."""

    statistics: ActivationStatistics
    model: MMDiT
    samples: Samples
    tiers: tuple[int, ...]
    thresholds: Thresholds
    segments: int
    two_regions: str = "auto"  # which inputs may have two regions of codes
    smoothing: dict[str, smooth.Search] = field(default_factory=dict)

    @cached_property
    def readers(self) -> dict[str, list[str]]:
        """Per input, the linears that read it."""
        readers: dict[str, list[str]] = {}
        for path, source in self.statistics.layers.items():
            readers.setdefault(source, []).append(path)
        return readers

    @cached_property
    def linears(self) -> np.ndarray:
        """How many linears read each input, in the order of `tables`."""
        return np.array([len(self.readers[path]) for path in self.statistics.inputs])

    @cached_property
    def rows(self) -> dict[str, list[np.ndarray]]:
        return sampled_rows(self.model, self.samples, TOKENS_SAMPLED)

    @cached_property
    def ranges(self) -> dict[str, list[Range]]:
        """What the thresholds look at, per input and step."""
        return {path: input_ranges(found) for path, found in self.statistics.inputs.items()}

    @cached_property
    def tables(self) -> dict[str, InputScales]:
        """Scales of every input, for every step and tier; after the smoothing is decided."""
        return {path: self.scales(found) for path, found in self.statistics.inputs.items()}

    def scales(self, found: InputStatistics) -> InputScales:
        """With one region of codes and, where that is allowed, with two."""
        search = self.smoothing.get(found.path)
        factors = search.smoothing if search else None
        shift = one_shift(found.shift)
        tables = self.scale_tables(found, [PLAIN], shift, factors)
        post_gelu = shift is not None
        if self.two_regions in ("auto", "all") or (self.two_regions == "post-gelu" and post_gelu):
            tables += self.scale_tables(found, two_region_layouts(post_gelu), None, factors)
        return InputScales(tuple(tables), self.two_regions == "auto" and not post_gelu)

    def scale_tables(
        self,
        found: InputStatistics,
        layouts: Sequence[Regions],
        shift: np.ndarray | None,
        factors: np.ndarray | None,
    ) -> list[ScaleTable]:
        """One table for each layout of codes."""
        largest = largest_values(found.minimum, found.maximum, shift, factors)
        lowest = (found.minimum if factors is None else found.minimum / factors).min(axis=1)
        points = self.points(found, largest, shift, factors)
        return [
            scale_table(points, largest, self.tiers, shift, factors, regions, lowest)
            for regions in layouts
        ]

    def points(
        self,
        found: InputStatistics,
        largest: np.ndarray,
        shift: np.ndarray | None,
        factors: np.ndarray | None,
    ) -> list[Points]:
        """Each step's distribution of |x - shift| / factors.

        After smoothing it is that of the sampled rows of the nearest stored step, stretched to the
        range that the step is known to have; an error there counts as what it is in the input.
        """
        if factors is None:
            counts = found.hist if shift is None else found.hist_centred
            return [histogram.points(step) for step in counts]
        stored = np.array([step for _, step in self.samples.pairs])
        shapes = []
        for x in self.rows[found.path]:
            scaled = np.abs((x if shift is None else x - shift) / factors)
            weights = np.broadcast_to(np.square(factors), scaled.shape)
            counts = histogram.weighted(scaled / max(scaled.max(), 1e-30), weights)
            shapes.append(histogram.points(counts))
        nearest = [shapes[int(np.abs(stored - key).argmin())] for key in self.statistics.step_keys]
        return [(shape * top, w) for (shape, w), top in zip(nearest, largest, strict=True)]

    def by_thresholds(self) -> Bits:
        """The published rule's tiers, with the smoothing that was decided."""
        return {path: self.threshold_tiers(path, path in self.smoothed) for path in self.ranges}

    def threshold_tiers(self, path: str, smoothed: bool) -> np.ndarray:
        """(steps,) tiers of one input by the published rule."""
        found = self.ranges[path]
        return np.array([threshold_tier(r, self.thresholds, self.tiers, smoothed) for r in found])

    @property
    def smoothed(self) -> list[str]:
        """Inputs for which the search found a smoothing that helps."""
        return [path for path, search in self.smoothing.items() if search.strength]

    def spiked(self) -> list[str]:
        """Inputs in which, at any step, a few channels stand far above all others."""
        return [
            path
            for path, ranges in self.ranges.items()
            if any(has_spikes(r, self.thresholds) for r in ranges)
        ]

    def foldable(self) -> list[str]:
        """Inputs whose factors can be moved into what precedes them: the modulation before q, k, v
        and fc1, the values before o_proj. GELU is in the way of fc2's."""
        return [path for path in self.statistics.inputs if not is_post_gelu(path)]

    def to_smooth(self, which: str) -> list[str]:
        """The inputs that one of SMOOTHINGS means."""
        if which == "all":
            return list(self.statistics.inputs)
        return {"foldable": self.foldable, "spikes": self.spiked, "none": list}[which]()

    def uniform(self, bits: int) -> Bits:
        steps = len(self.statistics.step_keys)
        return {path: np.full(steps, bits) for path in self.statistics.inputs}

    def search_smoothing(self, paths: Sequence[str]) -> None:
        """Finds the strength for these inputs, at the tiers that smoothing would allow; inputs
        that hang together get one."""
        wanted = {values_of(path) for path in paths}
        groups: dict[str, list[str]] = {}
        for path in self.statistics.inputs:
            if values_of(path) in wanted:
                groups.setdefault(values_of(path), []).append(path)
        for members in groups.values():
            found = smooth.search([self.reader(path) for path in members])
            self.smoothing |= dict.fromkeys(members, found)

    def reader(self, path: str) -> smooth.Reader:
        """Sampled rows of one input, and all weights that read it."""
        keys, tiers = list(self.statistics.step_keys), self.threshold_tiers(path, smoothed=True)
        places = [keys.index(step) for _, step in self.samples.pairs]
        rows = [
            smooth.Rows(x, int(tiers[place]))
            for x, place in zip(self.rows[path], places, strict=True)
        ]
        weights = [module_at(self.model, name).weight for name in self.readers[path]]
        stacked = np.concatenate([np.array(w.astype(mx.float32)) for w in weights])
        found = self.statistics.inputs[path]
        shift = one_shift(found.shift)
        offset = 0.0 if shift is None else shift
        widths = np.maximum(offset - found.minimum, found.maximum - offset).max(axis=0)
        return smooth.Reader(rows, stacked, widths, shift)

    def layers(self, bits: Bits) -> dict[str, LayerConfig]:
        """Every linear's configuration at these tiers."""
        by_input = {p: t.layer(bits[p], self.segments, STEADY) for p, t in self.tables.items()}
        return {path: by_input[source] for path, source in self.statistics.layers.items()}

    def average_bits(self, bits: Bits) -> float:
        return average_bits(np.stack([bits[p] for p in self.statistics.inputs]), self.linears)

    def measure(self, bits: Bits) -> float:
        """SQNR of the guided velocity at these tiers on the stored steps, mean in dB."""
        step = CurrentStep(self.statistics.sigmas)
        modules = self.simulated(step, self.layers(bits))
        with replaced(self.model, modules):
            errors = self.samples.relative_errors(step.following(self.model))
        return float(np.mean(-10 * np.log10(np.maximum(errors, 1e-20))))

    def simulated(
        self, step: CurrentStep, layers: Mapping[str, LayerConfig]
    ) -> dict[str, nn.Module]:
        linears = block_linears(self.model)
        return {
            path: SimulatedLinear(linears[path], static_quantizer(step, layer))
            for path, layer in layers.items()
        }

    def leave_one_out(self, advance: Callable[[], None]) -> dict[str, np.ndarray]:
        """Per input (tiers, pairs): the velocity's error with this input alone quantized."""
        step = CurrentStep(self.statistics.sigmas)
        call = step.following(self.model)
        changes = {
            path: [self.one_input(step, path, tier) for tier in self.tiers]
            for path in self.statistics.inputs
        }
        found = {}
        for path, errors in self.samples.leave_one_out(self.model, call, changes):
            found[path] = errors
            advance()
        return found

    def one_input(self, step: CurrentStep, path: str, tier: int) -> dict[str, nn.Module]:
        layer = self.tables[path].layer(np.full(len(self.statistics.step_keys), tier))
        return self.simulated(step, dict.fromkeys(self.readers[path], layer))

    def leave_one_out_seconds(self) -> float:
        """What leave_one_out will take, from one forward."""
        started = time.perf_counter()
        self.samples.relative_errors(self.model)
        return (time.perf_counter() - started) * len(self.statistics.inputs) * len(self.tiers)

    def by_error(
        self, effects: Mapping[str, np.ndarray], bits: float | None, sqnr: float | None
    ) -> Bits:
        """The tiers with the least error of the velocity within a budget.

        `bits` is an average, `sqnr` the dB to reach with as few bits as possible.
        """
        paths = list(self.statistics.inputs)
        errors = np.stack([self.step_errors(path, effects[path]) for path in paths])
        steps, count = errors.shape[1], len(self.tiers)
        cells = np.repeat(self.linears, steps)
        found = frontier(errors.reshape(-1, count), cells, self.tiers)
        units = (
            found.within_bits(bits)
            if sqnr is None
            else found.within_error(steps * 10 ** (-sqnr / 10))
        )
        chosen = found.tiers_at(units).reshape(len(paths), steps)
        return dict(zip(paths, chosen, strict=True))

    def step_errors(self, path: str, effects: np.ndarray) -> np.ndarray:
        """(steps, tiers) error of the velocity: that measured at a few steps, spread over all by
        the input's own quantization error at each."""
        table, keys = self.tables[path], list(self.statistics.step_keys)
        places = [keys.index(step) for _, step in self.samples.pairs]
        own = np.maximum(table.error, 1e-30)
        shape = own / own[places].mean(axis=0)
        return shape * effects.mean(axis=1)

    def config(self, bits: Bits, made_from: dict[str, object]) -> QuantConfig:
        statistics, layers = self.statistics, self.layers(bits)
        plain = {path: self.plain_scale(path, bits[path], layers[path]) for path in self.smoothed}
        layers = {
            path: replace(layer, plain_scale=plain.get(statistics.layers[path]))
            for path, layer in layers.items()
        }
        return QuantConfig(made_from, statistics.step_keys, statistics.sigmas, layers)

    def plain_scale(self, path: str, bits: np.ndarray, layer: LayerConfig) -> list[float]:
        """Scales for weights that were not rounded with this input's smoothing."""
        found, regions = self.statistics.inputs[path], Regions(layer.coarse, layer.coarse_sides)
        (table,) = self.scale_tables(found, [regions], layer.shift, None)
        return table.layer(bits, self.segments, STEADY).scale


def input_ranges(found: InputStatistics) -> list[Range]:
    """What the thresholds look at, for each step of one input."""
    shifted = found.shift is not None
    counts = found.hist_centred if shifted else found.hist
    ranges = []
    for index, hist in enumerate(counts):
        offset = found.shift[index] if shifted else 0.0
        width = np.maximum(offset - found.minimum[index], found.maximum[index] - offset)
        largest = float(width.max())
        p50, p99 = (histogram.percentile(hist, share, largest) for share in (0.5, 0.99))
        ranges.append(Range(p50, p99, width, shifted))
    return ranges


def open_plan(
    statistics: ActivationStatistics, calib_dir: str | Path, model: Model | None, options: Options
) -> Plan:
    """Opens the model and some stored steps, which must be those of the statistics."""
    trajectories, pipeline = open_with_pipeline(calib_dir, model)
    wanted = {
        "model": pipeline.name,
        "model_hash": pipeline.hash,
        "calibration_hash": trajectories.hash,
    }
    require_match(
        statistics.folder / STATISTICS_NAME,
        statistics.made_from,
        wanted,
        "collect the activations again, or give their own --calib-dir",
    )
    pairs = spread_pairs(trajectories.num_images, statistics.step_keys, options.samples)
    stored = Samples.load(trajectories, pipeline, pairs)
    return Plan(
        statistics,
        pipeline.transformer,
        stored,
        tuple(options.tiers),
        options.thresholds,
        options.segments,
        options.two_regions,
    )
