"""What enters and leaves every block, caught in one pass of the whole transformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from ..models.paths import BLOCKS, replaced


@dataclass
class BlockTrace:
    """The streams between the blocks of one forward pass, (rows, tokens, hidden) each.

    `image[i]` and `text[i]` enter block i, and leave block i - 1; the last block gives no text.
    """

    image: list[mx.array] = field(default_factory=list)
    text: list[mx.array] = field(default_factory=list)
    conditioning: mx.array | None = None

    def arrays(self, entry_only: bool = False) -> dict[str, mx.array]:
        """All that was caught by name, or only what entered block 0."""
        last = 1 if entry_only else None
        named = {f"image_{i}": x for i, x in enumerate(self.image[:last])}
        named |= {f"text_{i}": x for i, x in enumerate(self.text[:last])}
        return named | {"conditioning": self.conditioning}


class CatchingBlock(nn.Module):
    """Runs a block and notes what it was given; the last one also what it gave."""

    def __init__(self, block: nn.Module, trace: BlockTrace, last: bool) -> None:
        super().__init__()
        # In a tuple, so that the trace is no parameter and the block is found at its own path.
        self._caught = (block, trace, last)

    def __call__(
        self, image: mx.array, text: mx.array, conditioning: mx.array
    ) -> tuple[mx.array, mx.array | None]:
        block, trace, last = self._caught
        trace.image.append(image)
        trace.text.append(text)
        trace.conditioning = conditioning
        image, text = block(image, text, conditioning)
        if last:
            trace.image.append(image)
        return image, text


@contextmanager
def captured_blocks(transformer: nn.Module) -> Iterator[BlockTrace]:
    """Notes what passes between the blocks while the context lasts, for one forward pass.

    The real blocks come back whatever happens.
    """
    trace, blocks = BlockTrace(), transformer[BLOCKS]
    catching = {
        f"{BLOCKS}.{i}": CatchingBlock(block, trace, i == len(blocks) - 1)
        for i, block in enumerate(blocks)
    }
    with replaced(transformer, catching):
        yield trace
