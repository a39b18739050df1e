"""Transformers of random weights whose whole steps are timed, in 16 bits and on codes, and what a
step takes: multiply-adds, bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from src.backends import Weight, choose, named
from src.benchmarking.subjects import again, with_layers
from src.inference.int8 import share_work
from src.inference.kernels import SIDE, TEXT_TOKENS, join, rows_of
from src.models.configs import MMDiTConfig, config_named
from src.models.load import default_dtype
from src.models.mmdit import MMDiT
from src.models.paths import block_linears
from src.models.pipeline import Conditioning, Defaults, Pipeline
from src.quant.artifacts import LayerConfig
from src.quant.grid import absmax_scale, nearest_codes
from src.quant.int8 import INT8Linear
from src.quant.linear import QuantizedLinear, Runtime
from src.quant.schedule import Schedule, Step
from src.sampling import sd3_sigmas

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from tools.synthetic import fill_random

STEPS, GUIDANCE, SHIFT = 28, 5.0, 3.0
GUIDED = 2  # rows of the batch to a picture
SIGMAS = tuple(float(s) for s in sd3_sigmas(STEPS)[:-1])
TIMED = SIGMAS[3]  # the step that is timed: all take the same
BASE, MLX4 = "16 bits", "W4A16, MLX's own 4 bits"
BITS, GROUP = (8, 4), 64


@dataclass(frozen=True)
class Model:
    """In 16 bits, and its codes of 8 and 4 bits, which all kernels share."""

    exact: Pipeline
    codes: dict[int, dict[str, QuantizedLinear]]  # by bits and path

    def draw_at(self, pixels: int) -> None:
        """What is made from now on suits one picture with sides of so many pixels."""
        self.exact.defaults = Defaults(STEPS, GUIDANCE, SHIFT, pixels, pixels, 0)

    def over(self, bits: int, kernel: str | None, joins: bool = True) -> Pipeline:
        """Multiplied by that kernel; none: as `select` decides for the size. Layers share work
        unless told otherwise."""
        step, rows = Step(Schedule(SIGMAS)), self.rows()
        backend = None if kernel is None else named(kernel)
        layers = {
            path: again(layer, self.exact.dtype, Runtime(step, "static", backend, rows(path)))
            for path, layer in self.codes[bits].items()
        }
        made = with_layers(self.exact, layers, step)
        if joins:
            join(made.transformer)
        return made

    def chosen(self, bits: int) -> tuple[str, ...]:
        """The kernels that `over` would let the layers choose at this size."""
        rows = self.rows()
        return tuple(
            choose(layer.packed, rows(path), layer.largest_code()).name
            for path, layer in self.codes[bits].items()
        )

    def replaced(self, layer_of: Callable[[nn.Linear], nn.Module]) -> Pipeline:
        linears = block_linears(self.exact.transformer)
        layers = {path: layer_of(linear) for path, linear in linears.items()}
        for layer in layers.values():
            mx.eval(layer.parameters())
        return with_layers(self.exact, layers)

    def in_mlx4(self) -> Pipeline:
        """As MLX's own quantization has it."""
        return self.replaced(lambda linear: nn.QuantizedLinear.from_linear(linear, GROUP, BITS[1]))

    def in_int8(self) -> Pipeline:
        """As `--use_int8` has it."""
        made = self.replaced(INT8Linear.from_linear)
        share_work(made.transformer, self.rows(), made.dtype)
        return made

    def rows(self) -> Callable[[str], int]:
        """From a layer's path to the tokens that it meets at once."""
        return rows_of(self.exact.transformer.config, self.exact.defaults)


def model_of(name: str) -> Model:
    """Of that shape, in the dtype that its pipeline would have here."""
    transformer, dtype = MMDiT(config_named(name)), default_dtype(name)
    fill_random(transformer, dtype)
    defaults = Defaults(STEPS, GUIDANCE, SHIFT, 0, 0, 0)
    exact = Pipeline(name, "", "", None, transformer, None, defaults, dtype)
    runtime = Runtime(Step(Schedule(SIGMAS)), backend=named("reference"))
    codes: dict[int, dict[str, QuantizedLinear]] = {bits: {} for bits in BITS}
    for path, linear in block_linears(transformer).items():
        for bits, layer in layers_of(path, linear, runtime).items():
            codes[bits][path] = layer
    return Model(exact, codes)


def layers_of(path: str, linear: nn.Linear, runtime: Runtime) -> dict[int, QuantizedLinear]:
    """Nearest codes, by bits."""
    grid, weight = grid_of(path, linear.weight.shape[1]), linear.weight.astype(mx.float32)
    bias, layers = linear.bias.astype(mx.float32)[None], {}
    if grid.shift is not None:
        bias = bias + weight @ mx.array(grid.shift)
    for bits in BITS:
        scale = absmax_scale(weight, bits)
        packed = packed_here(nearest_codes(weight, scale, bits), bits)
        layers[bits] = QuantizedLinear(
            Weight(packed, scale, bits),
            bias=bias,
            grid=grid,
            dtype=linear.weight.dtype,
            runtime=runtime,
        )
        mx.eval(layers[bits].parameters())
    return layers


def packed_here(codes: mx.array, bits: int) -> mx.array:
    """What `pack_codes` gives of 4 or 8 bits, made on the device: NumPy takes minutes for billions
    of codes."""
    a_word = 32 // bits
    stored = (codes.astype(mx.int32) + 2 ** (bits - 1)).astype(mx.uint32)
    places = bits * mx.arange(a_word, dtype=mx.uint32)
    return (stored.reshape(len(codes), -1, a_word) << places).sum(axis=-1)


def grid_of(path: str, columns: int) -> LayerConfig:
    """One scale for all steps, and a shift behind GELU: times depend on no number."""
    shift = np.full(columns, 0.1, np.float32) if path.endswith("fc2") else None
    return LayerConfig([8] * STEPS, [0.05] * STEPS, shift)


# --- what is measured


@dataclass(frozen=True)
class Inputs:
    """Of one guided step."""

    latent: mx.array
    conditioning: Conditioning
    tokens: int  # of a picture


def inputs_of(model: Model, pixels: int, pictures: int = 1) -> Inputs:
    """Random ones, for pictures with sides of so many pixels."""
    config, dtype, side = model.exact.transformer.config, model.exact.dtype, pixels // SIDE
    rows = GUIDED * pictures
    conditioning = Conditioning(
        mx.random.normal((rows, TEXT_TOKENS, config.text_dim)).astype(dtype),
        mx.random.normal((rows, config.pooled_dim)).astype(dtype),
    )
    latent = mx.random.normal((pictures, side, side, config.latent_channels))
    mx.eval(latent, conditioning.text, conditioning.pooled)
    return Inputs(latent, conditioning, (side // config.patch) ** 2)


def step_of(pipeline: Pipeline, inputs: Inputs) -> Callable[[], mx.array]:
    """The step as the pipeline runs it; modulation that is computed ahead is so here."""
    velocity = pipeline.velocity(inputs.conditioning, GUIDANCE, SIGMAS)
    return lambda: velocity(inputs.latent, mx.array(TIMED))


def held_bytes(transformer: MMDiT, left_out: Collection[str] = ()) -> int:
    """Of all arrays that the transformer holds, also those that a kernel has made, but for those of
    these names."""
    arrays = {id(a): a for name, a in arrays_of(transformer) if name not in left_out}
    return sum(array.nbytes for array in arrays.values())


def arrays_of(transformer: MMDiT) -> Iterator[tuple[str, mx.array]]:
    return ((n, a) for n, a in tree_flatten(transformer) if isinstance(a, mx.array))


def peak_of(call: Callable[[], mx.array]) -> int:
    """Bytes that one step needs on top of what is there."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(call())
    return mx.get_peak_memory() - before


def kernels_of(transformer: MMDiT) -> dict[str, int]:
    """How many of the quantized layers multiply by which kernel."""
    names = (m.kernel for _, m in transformer.named_modules() if hasattr(m, "kernel"))
    return dict(Counter(names))


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one guided step."""

    linears: int  # the block linears
    attention: int  # its two products
    modulation: int


def work_of(config: MMDiTConfig, pixels: int, pictures: int = 1) -> Work:
    """Counted from the shapes. The last text block has q, k and v only, and two parts of six in
    its modulation; blocks of dual attention have three parts more, the final layer two."""
    batch, image = GUIDED * pictures, (pixels // (SIDE * config.patch)) ** 2
    square, depth, dual = config.hidden**2, config.depth, config.dual_attention_blocks
    whole, attention = 4 + 2 * config.mlp_ratio, 4  # of a stream's linears, in squares
    of_image = depth * whole + dual * attention
    of_text = (depth - 1) * whole + 3
    pairs = depth * (image + TEXT_TOKENS) ** 2 + dual * image**2
    parts = (6 * depth + 3 * dual) + (6 * (depth - 1) + 2) + 2
    return Work(
        linears=batch * square * (of_image * image + of_text * TEXT_TOKENS),
        attention=batch * 2 * config.hidden * pairs,
        modulation=batch * square * parts,
    )
