"""What every command does with an error that is none of the user's words."""

from __future__ import annotations

from src.cli import STOPPED, OneLineErrors, command

import click
import numpy as np
import pytest
from click.testing import CliRunner

# As MLX words it on CUDA, on Metal of a buffer and of a kernel, and on a CPU.
OUT_OF_MEMORY = [
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
    "[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum allowed "
    "buffer size of 9 bytes.",
    "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU)",
    "[malloc] Unable to allocate 99 bytes.",
]


def failing(error: BaseException | None, **settings):
    """A command that ends so; without an error it asks NumPy for more than there can be."""

    @command(**settings)
    def draw() -> None:
        if error is None:
            np.empty(1 << 60, np.uint8)
        raise error

    return draw


@pytest.mark.parametrize("error", [None, *map(RuntimeError, OUT_OF_MEMORY)])
def test_too_little_memory_is_one_line_with_a_way_out(error):
    result = CliRunner().invoke(failing(error))
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: not enough memory (") and "--low-memory" in line
    assert error is None or str(error) in line


class Commands(OneLineErrors, click.Group):
    """Of which one ends so."""


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    "error, settings, line",
    [
        (KeyboardInterrupt(), {}, STOPPED),
        (KeyboardInterrupt(), {"stopped": "nothing is left"}, "nothing is left"),
        (click.Abort(), {}, STOPPED),
    ],
)
def test_ctrl_c_is_one_line_with_what_is_left(grouped, error, settings, line):
    draw, arguments = failing(error, **settings), []
    if grouped:
        draw, arguments = Commands(commands=[draw]), ["draw"]
    result = CliRunner().invoke(draw, arguments)
    assert result.exit_code == 130 and isinstance(result.exception, SystemExit)
    assert result.stderr.strip() == line


@pytest.mark.parametrize(
    "words",
    [
        'Failed to compile kernel: mma.h(55): catastrophic error: cannot open "crt/mma.h"\nmore',
        "[metal::Device] Unable to build metal library from source\nerror: unknown type name",
        "[Compile::eval_cpu] Failed to compile function with error code 1.",
    ],
)
def test_a_kernel_that_does_not_compile_is_one_line_with_a_way_out(words):
    result = CliRunner().invoke(failing(RuntimeError(words)))
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 1 and line.startswith("error: MLX could not compile a kernel (")
    assert words.splitlines()[0] in line and "ditq doctor" in line and "--kernel" in line


def test_other_errors_are_shown_whole():
    for error in (RuntimeError("shapes do not match"), ZeroDivisionError("x")):
        assert CliRunner().invoke(failing(error)).exception is error


def test_debugging_shows_all(monkeypatch):
    monkeypatch.setenv("DITQ_DEBUG", "1")
    error = RuntimeError(OUT_OF_MEMORY[0])
    assert CliRunner().invoke(failing(error)).exception is error
