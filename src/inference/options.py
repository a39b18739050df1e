"""Options that several commands share, each family behind one decorator."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from ..errors import UserError
from .int8 import Int8

Function = Callable[..., Any]


def int8_options(function: Function) -> Function:
    """Adds what says how a model is to be INT8; the command gets it as one `int8`."""

    @click.option(
        "--quantization", help="A JSON or YAML file with the block `quantization`.  [no INT8]"
    )
    @click.option(
        "--use_int8", "--use-int8", is_flag=True, help="Quantize to INT8 while loading.  [off]"
    )
    @click.option(
        "--int8_checkpoint",
        "--int8-checkpoint",
        help="A converted transformer in the place of the model's own.  [none]",
    )
    @wraps(function)
    def with_int8(
        *args: Any,
        quantization: str | None,
        use_int8: bool,
        int8_checkpoint: str | None,
        **options: Any,
    ) -> Any:
        return function(*args, int8=Int8(quantization, use_int8, int8_checkpoint), **options)

    return with_int8


def streaming_options(function: Function) -> Function:
    """Adds what says how many blocks are in memory; the command gets `blocks_in_memory` or None."""

    @click.option(
        "--enable_block_swap",
        "--enable-block-swap",
        is_flag=True,
        help="Read each block when its turn comes, and let it go.  [off]",
    )
    @click.option(
        "--blocks_in_memory",
        "--blocks-in-memory",
        type=int,
        help="Of the transformer's blocks, with --enable_block_swap.  [1]",
    )
    @wraps(function)
    def with_streaming(
        *args: Any, enable_block_swap: bool, blocks_in_memory: int | None, **options: Any
    ) -> Any:
        count = blocks_kept(enable_block_swap, blocks_in_memory)
        return function(*args, blocks_in_memory=count, **options)

    return with_streaming


def blocks_kept(enabled: bool, count: int | None) -> int | None:
    """None: all of them."""
    if count is not None and not enabled:
        raise UserError(f"--blocks_in_memory {count} needs --enable_block_swap; give both")
    if not enabled:
        return None
    return 1 if count is None else count
