"""`ditq doctor`: what this machine has, and what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import click
import mlx.core as mx

from . import __version__, blas
from .backends import Device, cuda_int8, device_name, metal_int8, tuning
from .cli import command, memory_bytes
from .errors import UserError
from .models.sd3_versions import check_packages
from .store import human_bytes

ROWS, HIDDEN, WIDE = 512, 1536, 6144  # SD3-medium's first MLP product at 512 tokens


def report() -> dict[str, str]:
    """One line a fact, in the order of printing."""
    return {
        "ditq": f"{__version__}, Python {platform.python_version()}, {platform.platform()}",
        "mlx": f"{importlib.metadata.version('mlx')}, default device {mx.default_device()}",
        "device": device_name(),
        "memory": total_memory(),
        "backends": ", ".join(usable_backends()),
        "kernels": tuning.status(),
        "integer kernels": integer_kernels(),
        "cpu BLAS": blas.describe(),
        "float32 matmul": f"{matmul_gflops():.0f} GFLOP/s on {mx.default_device()}",
        "sd3": sd3_state(),
    }


def integer_kernels() -> str:
    """How their self-test went, on the devices that they are for."""
    return (metal_int8 if mx.metal.is_available() else cuda_int8).status()


def usable_backends() -> list[str]:
    """Kinds of device that MLX can compute on here; `mx.compile` on the CPU needs a compiler."""
    backends = ["cpu" if shutil.which("c++") or shutil.which("g++") else "cpu (no C++ compiler)"]
    if mx.metal.is_available():
        backends.insert(0, "metal")
    if mx.cuda.is_available():
        backends.insert(0, "cuda")
    return backends


def matmul_gflops() -> float:
    """Median speed of a (512, 1536) x (1536, 6144) product."""
    a, b = mx.random.normal((ROWS, HIDDEN)), mx.random.normal((HIDDEN, WIDE))
    mx.eval(a, b)
    seconds = median_seconds(lambda: mx.eval(a @ b), repeats=3)
    return 2 * ROWS * HIDDEN * WIDE / seconds / 1e9


def median_seconds(work: Callable[[], None], repeats: int) -> float:
    """Of `repeats` runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def sd3_state() -> str:
    """Which DiffusionKit is installed, or what it lacks to be used."""
    try:
        check_packages()
    except UserError as error:
        return str(error)
    return f"diffusionkit {importlib.metadata.version('diffusionkit')}"


UNDER_WAY = (
    "What kernels that are under way hold comes on top: on an H200 0.5 to 0.9 GB at 512² and 2.1 "
    "to 2.8 at 1024², with sd3.5-large 1.5 and 3.4."
)


def sd3_report(checkpoint: Path | None = None) -> int:
    """Prints what Stable Diffusion 3 needs and what works here; how many checks failed."""
    from .inference import self_tests
    from .inference.sd3_memory import table

    checks = self_tests.sd3_checks(checkpoint)
    for line in self_tests.markdown(checks):
        click.echo(line)
    click.echo(f"\nGigabytes of MLX's memory, estimated; this machine has {total_memory()}:\n")
    for line in table():
        click.echo(line)
    if Device.here().kind != "cpu":
        click.echo(f"\n{UNDER_WAY}")
    return sum(check.passed is False for check in checks)


def total_memory() -> str:
    return human_bytes(memory_bytes())


@command()
@click.option(
    "--sd3",
    is_flag=True,
    help="Try out Stable Diffusion 3's parts instead, as a table for a bug report.  [off]",
)
@click.option("--checkpoint", type=Path, help="With --sd3: weights to look at.  [the hub's cache]")
def main(sd3: bool, checkpoint: Path | None) -> None:
    """Show what this machine has and what is missing.

    \b
    Example:
      ditq doctor --sd3
    """
    if sd3:
        failed = sd3_report(checkpoint)
        if failed:
            raise UserError(f"{failed} of the checks above failed; paste the table into a report")
        return
    if checkpoint is not None:
        raise UserError(f"--checkpoint {checkpoint} needs --sd3; give both")
    for name, value in report().items():
        click.echo(f"{name:15} {value}")


if __name__ == "__main__":
    main()
