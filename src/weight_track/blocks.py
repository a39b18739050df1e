"""The model's blocks with stand-ins, and what enters and leaves them, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ..calibration.block_cache import BlockCache
from ..models.mmdit import JointBlock, MMDiT
from ..models.paths import BLOCKS, block_linears, set_module
from ..quant.artifacts import QuantConfig, RoundedLayer
from ..quant.attention import attend
from ..quant.block_rounding import RoundedBlock
from ..quant.grid import activation_limit, dequantize
from ..quant.qdrop import ActivationGrid
from ..quant.standin import BlockData, StandIn, StandInBlock

Streams = tuple[mx.array, mx.array | None]


def stand_in_block(
    transformer: MMDiT, index: int, config: QuantConfig | None = None
) -> StandInBlock:
    """A float32 copy of one block, its linears replaced; smoothing and shift as configured."""
    original = transformer[BLOCKS][index]
    block = JointBlock(transformer.config, index)
    block.update(tree_map(lambda p: p.astype(mx.float32), original.parameters()))
    block.use_attention(attend)
    stand_ins = {}
    for path, linear in block_paths(transformer, index).items():
        shift = smoothing = None
        if config is not None and (own := config.layers.get(full_path(index, path))):
            shift, smoothing = as_array(own.shift), as_array(own.smoothing)
        stand_ins[path] = StandIn.from_linear(linear, shift, smoothing)
        set_module(block, path, stand_ins[path])
    return StandInBlock(block, stand_ins)


def as_array(vector: np.ndarray | None) -> mx.array | None:
    return None if vector is None else mx.array(np.asarray(vector, dtype=np.float32))


def block_paths(transformer: MMDiT, index: int) -> dict[str, nn.Linear]:
    """The linears of one block by their path within it."""
    prefix = full_path(index, "")
    return {
        path.removeprefix(prefix): linear
        for path, linear in block_linears(transformer).items()
        if path.startswith(prefix)
    }


def own_biases(transformer: MMDiT, index: int) -> dict[str, mx.array | None]:
    """The 16-bit model's biases, by path within the block."""
    return {path: linear.get("bias") for path, linear in block_paths(transformer, index).items()}


def full_path(index: int, path: str) -> str:
    """The linear path of a path within a block."""
    return f"{BLOCKS}.{index}.{path}"


def activation_grids(
    config: QuantConfig, index: int, paths: list[str], sigmas: list[float]
) -> dict[str, ActivationGrid]:
    """What the activation track chose for these steps, by path within the block."""
    grids = {}
    for path in paths:
        found = [config.at(full_path(index, path), sigma) for sigma in sigmas]
        grids[path] = ActivationGrid(
            mx.array(np.array([scale for _, scale in found], dtype=np.float32)),
            mx.array(np.array([activation_limit(bits) for bits, _ in found], dtype=np.float32)),
        )
    return grids


def rounded_layers(
    index: int, block: StandInBlock, rounded: RoundedBlock, biases: Mapping[str, mx.array | None]
) -> dict[str, RoundedLayer]:
    """What is written of a block, by linear path; `biases` are the model's own."""
    layers = {}
    for path, stand_in in block.stand_ins.items():
        bias = None
        if path in rounded.corrections:
            bias = rounded.corrections[path]
            if biases[path] is not None:
                bias = biases[path].astype(mx.float32) + bias
        smoothing = stand_in.get("smoothing")
        layers[full_path(index, path)] = RoundedLayer(
            np.array(rounded.codes[path]),
            np.array(rounded.scales[path]),
            np.array(rounded.activations[path].scale),
            None if bias is None else np.array(bias),
            None if smoothing is None else np.array(smoothing),
        )
    return layers


def put_rounded(
    block: StandInBlock,
    index: int,
    layers: Mapping[str, RoundedLayer],
    biases: Mapping[str, mx.array | None],
) -> None:
    """Gives the stand-ins the rounded weights and biases; `biases` are the model's own."""
    for path, stand_in in block.stand_ins.items():
        layer = layers[full_path(index, path)]
        stand_in.weight = dequantize(mx.array(layer.codes), mx.array(layer.scale))
        if layer.bias is not None:
            # The stand-in's bias may also hold the shift's share, which stays.
            known = biases[path]
            correction = mx.array(layer.bias) - (0 if known is None else known)
            block.add_biases({path: correction})


@dataclass
class BlockWalk:
    """Gives every block's data in turn: read from the cache, or computed block by block."""

    cache: BlockCache
    transformer: MMDiT
    batch_size: int
    quantized: bool = False  # whether what enters comes from the rounded blocks before
    wanted: set[int] | None = None  # blocks to give, where others can be passed over; None: all
    _exact: Streams | None = field(default=None, repr=False)
    _entered: Streams | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[tuple[int, BlockData]]:
        """Block by block; with a quantized prefix, call `leave` before asking for the next one."""
        conditioning = self.cache.stacked(["conditioning"])["conditioning"]
        step = mx.array(self.cache.step_index())
        must_walk = self.quantized or self.cache.entry_only
        for index in range(len(self.transformer[BLOCKS])):
            if self.wanted is not None and index not in self.wanted and not must_walk:
                self._exact = None
                continue
            image, text = self.entering(index)
            target = self.leaving(index, image, text, conditioning)
            entered = (image, text) if self._entered is None else self._entered
            yield index, BlockData(*entered, conditioning, step, *target)
            self._exact = target

    def entering(self, index: int) -> Streams:
        if self._exact is not None:
            return self._exact
        found = self.cache.stacked([f"image_{index}", f"text_{index}"])
        return found[f"image_{index}"], found[f"text_{index}"]

    def leaving(self, index: int, image: mx.array, text: mx.array, c: mx.array) -> Streams:
        """What the 16-bit block makes of what enters."""
        if self.cache.entry_only:
            return run_block(self.transformer[BLOCKS][index], image, text, c, self.batch_size)
        last = index == len(self.transformer[BLOCKS]) - 1
        names = [f"image_{index + 1}"] + ([] if last else [f"text_{index + 1}"])
        found = self.cache.stacked(names)
        return found[names[0]], None if last else found[names[1]]

    def leave(self, block: nn.Module, data: BlockData) -> None:
        """Runs the rounded block on what entered it: that enters the next one."""
        self._entered = run_block(block, data.image, data.text, data.conditioning, self.batch_size)


def run_block(
    block: nn.Module, image: mx.array, text: mx.array, conditioning: mx.array, batch_size: int
) -> Streams:
    """A block's output for many rows, some at a time."""
    outputs = []
    for start in range(0, len(image), batch_size):
        rows = slice(start, start + batch_size)
        outputs.append(block(image[rows], text[rows], conditioning[rows]))
        mx.eval(outputs[-1])
    images, texts = zip(*outputs, strict=True)
    return mx.concatenate(images), None if texts[0] is None else mx.concatenate(texts)
