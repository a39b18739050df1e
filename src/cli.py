"""What all commands share: the `ditq` group, options, error lines, progress, memory."""

from __future__ import annotations

import importlib
import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from . import __version__
from .errors import UserError
from .sampling import Step
from .store import human_bytes

DEBUG = "DITQ_DEBUG"

# What MLX says on a CPU, on CUDA, and on Metal of one buffer and of all that a kernel needs.
NO_MEMORY = re.compile(
    r"unable to allocate|out of memory|maximum allowed buffer size|insufficient memory", re.I
)
LESS_MEMORY = (
    "fewer pictures at once, smaller ones or --low-memory take less, where the command has them, "
    "as does another program's end; what is finished is kept"
)

# And where its compiler for CUDA, Metal or a CPU fails.
NO_KERNEL = re.compile(r"failed to compile|compilation failed|unable to build|nvrtc", re.I)
OTHER_KERNEL = (
    "`ditq doctor` says what this machine runs; --kernel names another, where the command has it"
)

STOPPED = "stopped; what is finished is kept, the same command does the rest"

# Commands in the order of use: name on the command line, module in this package.
COMMANDS = {
    "doctor": "doctor",
    "demo": "demo",
    "generate": "generate",
    "generate-calibration-data": "generate_calibration_data",
    "cache-adaround-data": "cache_adaround_data",
    "adaround-optimize": "adaround_optimize",
    "collect-layer-activations": "collect_layer_activations",
    "analyze-activations": "analyze_activations",
    "load-adaround-model": "load_adaround_model",
    "sample": "sample",
    "evaluate": "evaluate",
    "benchmark": "benchmark",
    "tune": "tune",
    "convert-to-int8": "convert_to_int8",
}


class OneLineErrors:
    """A click command that ends a user's mistake with one line and exit code 1."""

    def main(self, *args: Any, **kwargs: Any) -> None:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)  # type: ignore[misc]
        except (KeyboardInterrupt, click.Abort) as error:  # before RuntimeError, which Abort is
            click.echo(str(error) or STOPPED, err=True)
            sys.exit(130)
        except (UserError, OSError, click.ClickException) as error:
            if os.environ.get(DEBUG) == "1":
                raise
            fail(error)
        except (MemoryError, RuntimeError) as error:
            if os.environ.get(DEBUG) == "1" or (explained := of_machine(error)) is None:
                raise
            fail(explained)
        sys.exit(code if isinstance(code, int) else 0)


class Command(OneLineErrors, click.Command):
    """`stopped` is what is said where Ctrl-C ends it."""

    def __init__(self, *args: Any, stopped: str = STOPPED, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.stopped = stopped

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            click.echo(err=True)  # the terminal's ^C stands in the line
            raise click.Abort(self.stopped) from None


class Group(OneLineErrors, click.Group):
    """Imports a command's module only when it is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f".{COMMANDS[name]}", __package__).main


def of_machine(error: Exception) -> UserError | None:
    """What to say of an error that is the machine's; none for a bug, which is shown whole."""
    words = str(error)
    if isinstance(error, MemoryError) or NO_MEMORY.search(words):
        return UserError(f"not enough memory ({words}); {LESS_MEMORY}")
    if NO_KERNEL.search(words):
        first = next(line for line in words.splitlines() if NO_KERNEL.search(line))
        return UserError(f"MLX could not compile a kernel ({first.strip()[:300]}); {OTHER_KERNEL}")
    return None


def fail(error: Exception) -> None:
    """Prints the error on one line and leaves with exit code 1."""
    if isinstance(error, click.ClickException):
        message = f"{error.format_message()} (--help lists the options)"
    elif isinstance(error, OSError) and error.filename:
        message = f"{error.filename}: {error.strerror}"
    else:
        message = str(error)
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(1)


def command(**settings: Any) -> Callable[[Callable[..., Any]], Command]:
    """A command of the house: one-line errors, and a default beside every option."""
    return click.command(cls=Command, context_settings={"show_default": True}, **settings)


@click.group(cls=Group, context_settings={"show_default": True})
@click.version_option(__version__, prog_name="ditq")
def main() -> None:
    """Post-training quantization of diffusion transformers on MLX."""


class Bar:
    """A progress bar over sampling steps; without a total it counts those of one run.

    Nothing is shown before the first run begins, so that an early error stands alone.
    """

    def __init__(self, label: str, total: int | None = None) -> None:
        self._label, self._total = label, total
        self._bar: tqdm | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def before(self, latent: mx.array, sigmas: np.ndarray) -> None:
        if self._bar is None:
            total = len(sigmas) - 1 if self._total is None else self._total
            self._bar = tqdm(total=total, desc=self._label, unit="step")

    def step(self, step: Step) -> None:
        self._bar.update()


def memory_bytes() -> int:
    """Of the device where it has its own, else of the machine."""
    info = mx.device_info()
    for key in ("memory_size", "total_memory"):
        if key in info:
            return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(needed: float, why: str, ways_out: str) -> None:
    """Raises where the device, or the machine, has fewer bytes than are needed."""
    if needed > (there := memory_bytes()):
        raise UserError(f"{why}, this machine has {human_bytes(there)}; {ways_out}")


def peak_memory_bytes() -> int:
    """The most memory that was in use: the device's on a GPU, the process's on the CPU."""
    if mx.default_device() != mx.Device(mx.cpu):
        return mx.get_peak_memory()
    return process_peak_bytes()


def process_peak_bytes() -> int:
    """The most of the machine's own memory that the process held."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    # What getrusage tells on Linux, a child inherits from its parent.
    if found := re.search(r"^VmHWM:\s*(\d+) kB", text, re.MULTILINE):
        return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main()
