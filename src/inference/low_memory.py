"""Sampling with the modulation out of memory: computed for all steps first, then let go.

A third of SD3-medium's weights are its modulation, which reads nothing but the pooled text and the
noise level. Both are known before the first step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from ..backends import UNPACKING, staying_packed
from ..errors import UserError
from ..models.mmdit import MMDiT
from ..models.paths import modulates
from ..models.pipeline import Conditioning, Pipeline
from ..quant.linear import QuantizedLinear
from ..quant.schedule import SAME_SIGMA
from ..store import load_tensors, require_space, save_tensors

# Gives tensors of the transformer by name, unread: MLX reads a tensor when it is first used.
Reread = Callable[[], Mapping[str, mx.array]]


@contextmanager
def low_memory(pipeline: Pipeline, reread: Reread | None = None) -> Iterator[None]:
    """While the context lasts, the pipeline's `sample` keeps no modulation weights while it
    denoises; each prompt reads them again.

    `reread` gives the weights as the transformer has them now, such as from the folder that it was
    loaded from. Without it they are written to a temporary file. Pictures are the same.
    """
    transformer = pipeline.transformer
    check_kernels(transformer)
    with tempfile.TemporaryDirectory() as folder:
        ahead = ModulationAhead(transformer, reread or spilled(transformer, Path(folder)))
        ahead.release()
        pipeline.modulate_ahead = ahead
        try:
            yield
        finally:
            pipeline.modulate_ahead = None
            ahead.release()  # read again when they are needed, if the file is gone by then too


def check_kernels(transformer: MMDiT) -> None:
    """Raises where quantized layers hold their weights unpacked."""
    for _, layer in transformer.named_modules():
        if isinstance(layer, QuantizedLinear) and layer.kernel in UNPACKING:
            raise UserError(
                f"--low-memory needs weights that stay packed, kernel {layer.kernel} unpacks them; "
                f"use --kernel {staying_packed()}"
            )


def released_tensors(transformer: MMDiT) -> dict[str, mx.array]:
    """By name, the parameters that nothing but the modulation reads."""
    return {
        name: tensor for name, tensor in tree_flatten(transformer.parameters()) if modulates(name)
    }


def spilled(transformer: MMDiT, folder: Path) -> Reread:
    """Writes the modulation's tensors to a file of the folder, from which they are read again."""
    tensors, path = released_tensors(transformer), folder / "modulation.safetensors"
    require_space(folder, sum(t.nbytes for t in tensors.values()), "the modulation, for a while,")
    save_tensors(path, tensors)
    return lambda: load_tensors(path)


@dataclass(frozen=True)
class VectorTable:
    """What every modulation layer gives, at each of some noise levels."""

    sigmas: Sequence[float]
    vectors: Sequence[list[mx.array]]  # per level

    def __call__(self, sigma: mx.array) -> list[mx.array]:
        """The vectors of a level of the table; another level is an error."""
        wanted = float(sigma)
        nearest = min(range(len(self.sigmas)), key=lambda i: abs(self.sigmas[i] - wanted))
        if abs(self.sigmas[nearest] - wanted) > SAME_SIGMA * wanted:
            raise ValueError(f"modulation was not computed for sigma {wanted}")
        return self.vectors[nearest]


class ModulationAhead:
    """Computes tables of vectors and keeps the weights for no longer than that takes.

    The transformer is whole at all times: what is released is there as tensors not yet read.
    """

    def __init__(self, transformer: MMDiT, reread: Reread) -> None:
        self._transformer, self._reread = transformer, reread
        self._dtypes = {n: t.dtype for n, t in released_tensors(transformer).items()}

    def __call__(self, conditioning: Conditioning, sigmas: Sequence[float]) -> VectorTable:
        """One layer after the other, at each level with the products of a step: equal bits."""
        transformer, pooled = self._transformer, conditioning.pooled
        try:
            timesteps = [
                mx.broadcast_to(1000 * mx.array(sigma, dtype=mx.float32), (len(pooled),))
                for sigma in sigmas
            ]
            inputs = [transformer.conditioning(pooled, timestep) for timestep in timesteps]
            mx.eval(inputs)
            columns = []
            for path, layer in transformer.modulation_layers().items():
                columns.append([layer.vector(x) for x in inputs])
                mx.eval(columns[-1])
                self.release(path)
        finally:
            self.release()
        return VectorTable(list(sigmas), [list(row) for row in zip(*columns, strict=True)])

    def release(self, path: str = "") -> None:
        """Puts unread tensors in the place of those under the path, of all of them without one."""
        tensors = self._reread()
        unread = [
            (name, tensors[name].astype(dtype))
            for name, dtype in self._dtypes.items()
            if name.startswith(path)
        ]
        self._transformer.load_weights(unread, strict=False)
        mx.clear_cache()
