"""Sampling with few of the transformer's blocks in memory: each is read when its turn comes.

A step runs all blocks in order, and the next step the same again. So some blocks stay in memory,
evenly spread, and the others pass through one place: while a block computes, the next one that is
not in memory is read from the file, by MLX's own reading threads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import UserError
from ..models.load import Model
from ..models.mmdit import MMDiT
from ..models.paths import BLOCKS
from ..models.pipeline import Pipeline, compiling_is_faster
from ..quant.int8 import INT8Linear
from ..quant.linear import QuantizedLinear
from ..store import load_tensors, require_space, save_tensors
from .low_memory import Reread
from .saved import is_saved

Block = Callable[..., tuple[mx.array, mx.array | None]]
Tensors = dict[str, mx.array]  # of one block, by their names within it

BESIDE_LOW_MEMORY = (
    "--enable_block_swap reads a block with its modulation, which --low-memory keeps out of "
    "memory; give one of them"
)


@contextmanager
def streamed(
    pipeline: Pipeline,
    blocks_in_memory: int,
    reread: Reread | None = None,
    *,
    compiled: bool | None = None,
) -> Iterator[None]:
    """While the context lasts, no more than so many blocks are in memory, and one that is read.

    `reread` gives the transformer's tensors as it has them now, unread, such as from the file that
    it was loaded from. Without it the blocks are written to a temporary file. Pictures are the
    same. A block is compiled by itself, as the pipeline compiles a step, or as `compiled` says.
    """
    transformer = pipeline.transformer
    check_streaming(pipeline, blocks_in_memory)
    depth = len(transformer[BLOCKS])
    moving = moving_blocks(depth, blocks_in_memory)
    if not moving:
        yield
        return
    with ExitStack() as stack:
        if reread is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            reread = spilled(transformer, moving, Path(folder))
        stream = BlockStream(transformer, moving, reread, compiled)
        limit = mx.set_cache_limit(stream.largest)
        try:
            stream.begin()
            yield
        finally:
            mx.set_cache_limit(limit)
            stream.end()


def check_request(model: Model, blocks_in_memory: int, low_memory: bool) -> None:
    """Raises what `streamed` would refuse, as far as it is known before the model is opened."""
    check_count(blocks_in_memory)
    if low_memory:
        raise UserError(BESIDE_LOW_MEMORY)
    if is_saved(model):
        raise UserError(
            f"--enable_block_swap is for models of 16 bits and INT8, {model} has packed codes, "
            "which are kept ready for their kernel; use --low-memory"
        )


def check_count(blocks_in_memory: int) -> None:
    if blocks_in_memory < 1:
        raise UserError(f"--blocks_in_memory {blocks_in_memory} is not possible; valid: 1 or more")


def check_streaming(pipeline: Pipeline, blocks_in_memory: int) -> None:
    """Raises where blocks cannot be let go and read again."""
    check_count(blocks_in_memory)
    if pipeline.modulate_ahead is not None:
        raise UserError(BESIDE_LOW_MEMORY)
    for path, module in pipeline.transformer.named_modules():
        if isinstance(module, QuantizedLinear):
            raise UserError(
                f"--enable_block_swap is for models of 16 bits and INT8, {path} has "
                f"{module.bits}-bit codes, which are kept ready for their kernel; use --low-memory"
            )
        if isinstance(module, INT8Linear) and module.is_shell:
            raise UserError(f"{path} is an empty INT8 layer; load its checkpoint first")


def moving_blocks(depth: int, blocks_in_memory: int) -> list[int]:
    """Which blocks are read again in every step; those that stay are evenly spread."""
    if blocks_in_memory >= depth:
        return []
    staying = blocks_in_memory - 1  # one place is for the block that computes
    stay = {(2 * i + 1) * depth // (2 * staying) for i in range(staying)}
    return [index for index in range(depth) if index not in stay]


class BlockStream:
    """Reads blocks ahead and lets them go.

    The transformer is whole at all times: what is not in memory is there as tensors not yet read.
    """

    def __init__(
        self,
        transformer: MMDiT,
        moving: list[int],
        reread: Reread,
        compiled: bool | None = None,
    ) -> None:
        self._compiles = compiling_is_faster() if compiled is None else compiled
        self._compiled: dict[int, Block] = {}
        self._transformer, self._moving, self._reread = transformer, moving, reread
        self._blocks: list[nn.Module] = transformer[BLOCKS]
        self._dtypes = {
            index: {name: t.dtype for name, t in tree_flatten(self._blocks[index].parameters())}
            for index in moving
        }
        self._unread: dict[int, Tensors] = {}
        self.largest = max(bytes_of(self._blocks[index]) for index in moving)

    def begin(self) -> None:
        """Lets go of the blocks that move, and runs all from now on."""
        for index in self._moving:
            self.release(index)
        # What is around the blocks is compiled too where they are: compiled code rounds otherwise.
        ends, compiled = (self._transformer.begin, self._transformer.end), None
        if self._compiles:
            around = [m.state for n, m in self._transformer.children().items() if n != BLOCKS]
            compiled = tuple(mx.compile(end, inputs=around) for end in ends)
        self._transformer.run_blocks_with(self.run, compiled)
        mx.clear_cache()

    def end(self) -> None:
        """The transformer runs its blocks itself, with what was let go still to be read."""
        self._transformer.run_blocks_with(None)
        # Of a temporary file too: what is open can be read though its name is gone.
        for index in self._moving:
            self.release(index)

    def run(self, index: int, block: Block, *inputs: mx.array) -> tuple[mx.array, mx.array | None]:
        """The block's outputs, computed; meanwhile the next one is read."""
        if index in self._dtypes:
            # On their way, but for the first of a picture. What computes must not wait for them by
            # itself: on a GPU memory may be had only when nothing runs there, and both would wait.
            mx.eval(self._blocks[index].parameters())
        outputs = self.compiled(index, block)(*inputs)
        mx.async_eval(*(out for out in outputs if out is not None))
        self.read(self.next_moving(index))
        mx.eval(*(out for out in outputs if out is not None))
        if index in self._dtypes:
            self.release(index)
        return outputs

    def compiled(self, index: int, block: Block) -> Block:
        """The block, or what MLX has made of it; its weights are inputs, so they may move."""
        if not self._compiles or block is not self._blocks[index]:
            return block
        if index not in self._compiled:
            self._compiled[index] = mx.compile(block, inputs=block.state)
        return self._compiled[index]

    def next_moving(self, index: int) -> int:
        """The one to be read while this block computes; after the last, the next step's first."""
        later = [moving for moving in self._moving if moving > index]
        return later[0] if later else self._moving[0]

    def read(self, index: int) -> None:
        """Begins to read what is not there yet."""
        mx.async_eval(self._blocks[index].parameters())

    def release(self, index: int) -> None:
        """Puts unread tensors in the place of the block's own."""
        if index not in self._unread:
            self._unread = self.unread_blocks()
        exchange(self._blocks[index], self._unread.pop(index))

    def unread_blocks(self) -> dict[int, Tensors]:
        """Every moving block's tensors, none of them read."""
        with mx.stream(reading_stream()):
            tensors = self._reread()
            return {
                index: {
                    name: tensors[f"{BLOCKS}.{index}.{name}"].astype(dtype)
                    for name, dtype in dtypes.items()
                }
                for index, dtypes in self._dtypes.items()
            }


def exchange(block: nn.Module, tensors: Tensors) -> None:
    """Puts in the block's place of its tensors the same ones, unread; what INT8 layers have
    prepared of them holds."""
    layers = [module for module in block.modules() if isinstance(module, INT8Linear)]
    before = [(layer.prepared, layer.expects) for layer in layers]
    block.update(tree_unflatten(list(tensors.items())))
    for layer, was in zip(layers, before, strict=True):
        layer.prepared, layer.expects = was


@cache
def reading_stream() -> mx.Stream:
    """Another than the one that computes, so that neither waits for the other."""
    return mx.new_stream(mx.cpu)


def bytes_of(block: nn.Module) -> int:
    return sum(tensor.nbytes for _, tensor in tree_flatten(block.parameters()))


def spilled(transformer: MMDiT, moving: list[int], folder: Path) -> Reread:
    """Writes the blocks to files of the folder, one after the other, from which they are read."""
    blocks = transformer[BLOCKS]
    needed = sum(bytes_of(blocks[index]) for index in moving)
    require_space(folder, needed, "the transformer's blocks, for a while,")
    paths = {index: folder / f"{index}.safetensors" for index in moving}
    for index, path in paths.items():
        held = dict(tree_flatten(blocks[index].parameters()))
        save_tensors(path, held)
        del held
        exchange(blocks[index], load_tensors(path))
    return partial(read_spilled, paths)


def read_spilled(paths: Mapping[int, Path]) -> Tensors:
    return {
        f"{BLOCKS}.{index}.{name}": tensor
        for index, path in paths.items()
        for name, tensor in load_tensors(path).items()
    }
