"""Modulation of a whole model: which layers, at what cost in memory, on which scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..cli import require_memory
from ..errors import UserError
from ..models.hooks import NoiseLevel
from ..models.mmdit import MMDiT
from ..models.paths import BLOCKS, MODULATION
from ..models.pipeline import Pipeline
from ..quant.grid import check_bits
from ..quant.int8 import INT8Linear
from ..quant.linear import QuantizedLinear
from ..quant.modulated import Memory, Modulated, modulated
from ..quant.residual_scales import (
    ANCHOR_BITS,
    DYNAMIC,
    GUIDANCE,
    STATIC,
    Dynamic,
    OwnGrid,
    Quantizer,
    Static,
    check_kind,
)
from ..quant.schedule import Step
from ..sampling import uses_guidance
from ..store import human_bytes

ALL, AUTO = "all", "auto"
SCALE_PICTURES = 8
FLOAT_BYTES = 4  # of a value of â or ô
SAME = "same"  # scales for what auto leaves: those of all other layers
NO_REST = "--rest-scale and --rest-bit are for the layers that --modulate auto leaves; give it too"
STREAMS = ("image_transformer_block", "text_transformer_block")


@dataclass(frozen=True)
class Options:
    """How inputs are quantized, named as on the command line."""

    modulate: str | None = None  # all, auto, or a part of layers' paths; none: no layer
    act_bit: int = 8
    residual_scale: str = STATIC
    modulate_memory: float | None = None  # GB; none: as much as it takes
    scale_pictures: int = SCALE_PICTURES  # on which static scales are measured
    rest_scale: str | None = None  # of layers that auto leaves unmodulated; none: guidance
    rest_bit: int | None = None  # of these; none: act_bit

    def __post_init__(self) -> None:
        check_bits(self.act_bit, "--act-bit")
        check_kind(self.residual_scale, "--residual-scale")
        if self.modulate == "":
            raise UserError("--modulate is empty; valid: all, auto, or a part of layers' paths")
        if self.modulate_memory is not None and not 0 < self.modulate_memory < math.inf:
            raise UserError(f"--modulate-memory must be above 0 GB, got {self.modulate_memory}")
        if self.modulate == AUTO and self.modulate_memory is None:
            raise UserError("--modulate auto needs --modulate-memory, the GB that it may take")
        if self.scale_pictures < 1:
            raise UserError(f"--scale-pictures must be at least 1, got {self.scale_pictures}")
        self.check_rest()

    def check_rest(self) -> None:
        if self.rest_bit is not None:
            check_bits(self.rest_bit, "--rest-bit")
        if self.rest_scale not in (None, SAME, *DYNAMIC):
            raise UserError(
                f"unknown --rest-scale {self.rest_scale!r}; valid: {', '.join((SAME, *DYNAMIC))}"
            )
        if self.modulate != AUTO and (self.rest_scale, self.rest_bit) != (None, None):
            raise UserError(NO_REST)

    def settings(self) -> dict[str, Any]:
        """All of it, by name; what auto leaves is not left to a default, which may be another one
        when a run goes on."""
        rest = {"rest_scale": self.rest[1]} if self.modulate == AUTO else {}
        return asdict(self) | rest

    @property
    def rest(self) -> tuple[int, str]:
        """Bits and scales of an input that is quantized as it is."""
        if self.modulate != AUTO or self.rest_scale == SAME:
            return self.rest_bit or self.act_bit, self.residual_scale
        return self.rest_bit or self.act_bit, self.rest_scale or GUIDANCE


@dataclass(frozen=True)
class Work:
    """What will be drawn: scales are measured at its steps, memory is that of its batches."""

    num_steps: int
    cfg_weight: float
    height: int
    width: int
    batch_size: int = 1

    @classmethod
    def of(cls, pipeline: Pipeline, num_steps: int, cfg_weight: float, batch_size: int = 1) -> Work:
        defaults = pipeline.defaults
        return cls(num_steps, cfg_weight, defaults.height, defaults.width, batch_size)


@dataclass(frozen=True)
class Choice:
    """Which layers are modulated, and the bytes that all layers would keep."""

    layers: list[str]
    nbytes: Mapping[str, int]  # by path
    gains: Mapping[str, float] = field(default_factory=dict)  # relative error removed, with auto

    @property
    def taken(self) -> int:
        return sum(self.nbytes[path] for path in self.layers)

    def described(self, pictures: int) -> str:
        return (
            f"modulation keeps {human_bytes(self.taken)} for {len(self.layers)} of "
            f"{len(self.nbytes)} layers and {pictures} pictures at once; all layers would keep "
            f"{human_bytes(sum(self.nbytes.values()))}"
        )


class Levels:
    """Several that have to hear of the noise level."""

    def __init__(self, levels: Sequence[NoiseLevel]) -> None:
        self._levels = list(levels)

    def set_sigma(self, sigma: mx.array | float) -> None:
        for level in self._levels:
            level.set_sigma(sigma)

    @contextmanager
    def at(self, sigma: mx.array | float) -> Iterator[None]:
        with ExitStack() as stack:
            for level in self._levels:
                stack.enter_context(level.at(sigma))
            yield


def layers_of(model: MMDiT) -> dict[str, nn.Module]:
    """All that can be modulated, by path: the blocks' linears, quantized or not, but for the
    modulation that the text and the noise level are the only inputs of."""
    kinds = (nn.Linear, nn.QuantizedLinear, QuantizedLinear, INT8Linear, Modulated)
    found = {}
    for index, block in enumerate(model[BLOCKS]):
        for path, module in sorted(block.named_modules(), key=lambda item: item[0]):
            if isinstance(module, kinds) and MODULATION not in path:
                found[f"{BLOCKS}.{index}.{path}"] = module
    inner = {f"{path}.layer" for path, module in found.items() if isinstance(module, Modulated)}
    return {path: module for path, module in found.items() if path not in inner}


def cache_bytes(pipeline: Pipeline, work: Work) -> dict[str, int]:
    """By path, what a layer would keep from step to step."""
    model = pipeline.transformer
    height, width, _ = pipeline.latent_shape(work.height, work.width)
    image = height * width // model.config.patch**2
    tokens = dict(zip(STREAMS, (image, pipeline.encode_text.tokens()), strict=True))
    rows = work.batch_size * (2 if uses_guidance(work.cfg_weight) else 1)
    return {
        path: FLOAT_BYTES * rows * tokens[path.split(".")[2]] * sum(shape_of(layer))
        for path, layer in layers_of(model).items()
    }


def largest_work(options: Options, work: Work) -> Work:
    """With the most pictures for which something is kept: static scales are measured on some
    together."""
    measured = options.scale_pictures if options.residual_scale == STATIC else 0
    return replace(work, batch_size=max(work.batch_size, measured))


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear."""
    rows, columns = layer.weight.shape
    return rows, columns * 32 // layer.bits if "scales" in layer else columns


def matching(paths: Sequence[str], pattern: str) -> list[str]:
    """The paths of which the pattern, with * and ?, describes a part; or all."""
    if pattern == ALL:
        return list(paths)
    found = [path for path in paths if fnmatchcase(path, f"*{pattern}*")]
    if not found:
        raise UserError(
            f"--modulate {pattern!r} matches none of {len(paths)} layers; valid: {ALL}, {AUTO}, or "
            f"a part of such a path, with * and ?: {paths[0]}"
        )
    return found


def choose(
    pipeline: Pipeline,
    options: Options,
    work: Work,
    gains: Callable[[], Mapping[str, float]],
) -> Choice:
    """The layers that the options mean. With auto, those with the largest gain for a byte; else
    what does not fit into the memory is an error."""
    if options.modulate is None:
        return Choice([], {})
    nbytes, budget = cache_bytes(pipeline, work), options.modulate_memory
    if options.modulate == AUTO:
        found = gains()
        return Choice(within(budget * 1e9, found, nbytes), nbytes, found)
    choice = Choice(matching(list(nbytes), options.modulate), nbytes)
    if budget is not None and choice.taken > budget * 1e9:
        raise UserError(
            f"{choice.described(work.batch_size)}; that is more than --modulate-memory {budget} "
            "GB; draw fewer pictures at once and measure static scales on fewer, or use "
            f"--modulate {AUTO}"
        )
    return choice


def held_bytes(model: MMDiT) -> int:
    """Of every array that the model holds, also of what backends have unpacked."""
    arrays = {id(array): array.nbytes for array in model.arrays(vectors_are_given=False)}
    return sum(arrays.values())


def refuse_unmatched(pipeline: Pipeline, options: Options) -> None:
    """Raises for layers that are not there."""
    if options.modulate not in (None, AUTO):
        matching(list(layers_of(pipeline.transformer)), options.modulate)


def refuse(pipeline: Pipeline, options: Options, work: Work, weights: int = 0) -> None:
    """Raises for layers that are not there, or that keep too much, before any work.

    `weights` are the bytes that the model itself takes beside them: 0 where it is not yet what
    will draw.
    """
    if options.modulate is None:
        return
    largest = largest_work(options, work)
    if options.modulate == AUTO:
        if work.num_steps < 2:
            raise UserError("--modulate auto measures changes, and one step has none; draw in more")
        budget, nbytes = options.modulate_memory * 1e9, cache_bytes(pipeline, largest)
        if budget < min(nbytes.values()):
            raise nothing_fits(budget, nbytes)
        kept = min(budget, sum(nbytes.values()))
        said = f"--modulate-memory {options.modulate_memory} GB lets modulation keep "
        said, ways_out = f"{said}{human_bytes(kept)}", "give a smaller one"
    else:
        choice = choose(pipeline, options, largest, dict)
        kept, said = choice.taken, choice.described(largest.batch_size)
        ways_out = ways_to_keep_less(work, largest)
    beside = f"; with the model's weights that is {human_bytes(kept + weights)}" if weights else ""
    require_memory(kept + weights, f"{said}{beside}", ways_out)


def ways_to_keep_less(work: Work, largest: Work) -> str:
    """What binds is how many pictures are drawn at once, or on how many scales are measured."""
    ways = ["a --modulate pattern of fewer layers", f"--modulate {AUTO} with --modulate-memory"]
    if largest.batch_size > work.batch_size:
        ways.insert(0, "fewer --scale-pictures")
    elif work.batch_size > 1:
        ways.insert(0, "a smaller --batch-size")
    return f"give {', '.join(ways[:-1])}, or {ways[-1]}"


def within(budget: float, gains: Mapping[str, float], nbytes: Mapping[str, int]) -> list[str]:
    """Layers by gain a byte as long as they fit, in the order of the model."""
    if not any(gain > 0 for gain in gains.values()):
        raise UserError("modulation removes no error in any layer; leave out --modulate")
    left, taken = budget, set()
    for path in sorted(gains, key=lambda path: gains[path] / nbytes[path], reverse=True):
        if gains[path] > 0 and nbytes[path] <= left:
            left -= nbytes[path]
            taken.add(path)
    if not taken:
        raise nothing_fits(budget, nbytes)
    return [path for path in nbytes if path in taken]


def nothing_fits(budget: float, nbytes: Mapping[str, int]) -> UserError:
    return UserError(
        f"no layer fits into --modulate-memory {budget / 1e9:g} GB; the smallest keeps "
        f"{human_bytes(min(nbytes.values()))}"
    )


Quantizers = Mapping[str, tuple[Quantizer | None, Quantizer | None]]


@contextmanager
def wrapped(
    model: MMDiT, quantizers: Quantizers, level: NoiseLevel | None
) -> Iterator[dict[str, Modulated]]:
    """Wrappers around layers while the context lasts: by path, what quantizes changes and what
    quantizes values. `level` is what the model follows without them."""
    originals = layers_of(model)
    try:
        yield wrap(model, quantizers)
    finally:
        unwrap(model, originals, level)


def wrap(
    model: MMDiT, quantizers: Quantizers, exact: Mapping[str, nn.Module] | None = None
) -> dict[str, Modulated]:
    """The same for good; `exact` are layers in 16 bits that may stand in for the quantized ones."""
    memory, layers, exact = Memory(), layers_of(model), exact or {}
    wrappers = {
        path: modulated(
            layers[path], residuals, values=values, memory=memory, key=path, exact=exact.get(path)
        )
        for path, (residuals, values) in quantizers.items()
    }
    model.update_modules(tree_unflatten(list(wrappers.items())))
    model.memory = memory
    return wrappers


def unwrap(model: MMDiT, layers: Mapping[str, nn.Module], level: NoiseLevel | None) -> None:
    """Puts layers in the place of all wrappers."""
    model.update_modules(tree_unflatten(list(layers.items())))
    model.memory = None
    model.follow(level)


def quantizers_of(
    options: Options,
    layers: Mapping[str, nn.Module],
    chosen: Sequence[str],
    scales: Mapping[str, list[float]] | None,
    own: Step | None,
) -> dict[str, tuple[Quantizer | None, Quantizer | None]]:
    """By path, for changes and for values. Static scales belong to the steps of `own`; a layer that
    is modulated on them quantizes values by its own grid, where it has one."""
    bits, kind = options.act_bit, options.residual_scale
    found = {}
    for path, layer in layers.items():
        if path not in chosen:
            found[path] = (None, values_of(options, own, (scales or {}).get(path)))
        elif kind != STATIC:
            found[path] = tuple(Dynamic(bits, kind, first) for first in (ANCHOR_BITS, bits))
        else:
            tiers = [ANCHOR_BITS, *[bits] * (len(scales[path]) - 1)]
            found[path] = (Static(own, tiers, scales[path]), own_grid(layer))
    return found


def values_of(options: Options, own: Step | None, scales: list[float] | None) -> Quantizer:
    """For the input, as it is, of a layer that is not modulated."""
    bits, kind = options.rest
    if kind != STATIC:
        return Dynamic(bits, kind, bits)
    return Static(own, [bits] * len(scales), scales)


def own_grid(layer: nn.Module) -> OwnGrid | None:
    has_grid = isinstance(layer, QuantizedLinear) and layer.grid is not None
    return OwnGrid(layer) if has_grid else None
