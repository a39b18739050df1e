"""What may take part in a transformer's forward pass from outside."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import mlx.core as mx

Ends = tuple[Callable[..., tuple[mx.array | None, ...]], Callable[..., mx.array]]  # begin, end


class NoiseLevel(Protocol):
    """What layers read that compute differently at different noise levels."""

    def set_sigma(self, sigma: mx.array | float) -> None:
        """One sigma, or one for each row of the batch."""

    def at(self, sigma: mx.array | float) -> AbstractContextManager[None]:
        """The same while a context lasts."""


class Memory(Protocol):
    """What layers keep from one step of a picture to the next."""

    arrays: dict[str, list[mx.array]]  # a compiled step's inputs and outputs

    def reset(self, guided: bool = False) -> None:
        """The next step is the first of another picture; `guided`: its batch is the prompts' rows
        and, behind them, the negative prompts'."""

    def watched(self, velocity: Callable[..., mx.array]) -> Callable[..., mx.array]:
        """The velocity of (latent, sigma), with an error where its steps do not hang together."""


class RunBlock(Protocol):
    def __call__(
        self,
        index: int,
        block: Callable[..., tuple[mx.array, mx.array | None]],
        *inputs: mx.array,
    ) -> tuple[mx.array, mx.array | None]:
        """What block number `index` makes of its inputs: `block(*inputs)`."""


def run_block(
    index: int, block: Callable[..., tuple[mx.array, mx.array | None]], *inputs: mx.array
) -> tuple[mx.array, mx.array | None]:
    return block(*inputs)
