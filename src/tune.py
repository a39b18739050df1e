"""Which kernel multiplies the fastest on this machine, from how many rows on."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Sequence
from pathlib import Path

import click

from .backends.tuning import CHOICES, Point, default_path, described
from .backends.weight import PACKED_COLUMNS
from .benchmarking.kernels import available
from .benchmarking.tuning import lines_of, measured
from .cli import command, require_memory
from .errors import UserError
from .store import human_bytes, require_writable, write_json

# SD3-medium's, the smallest that every kernel takes, and nano's; the most wanted first.
SHAPES = ((1536, 1536), (6144, 1536), (1536, 6144), (256, 256), (192, 192))
ROWS = (1, 8, 32, 128, 256, 512, 1024, 2048, 4096, 8192)


def tune(
    output: str | Path | None = None,
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    rounds: int = 5,
    seconds: float = 50.0,
) -> list[Point]:
    """Measures layers of these (N, K) under each kernel that may be chosen here, the most rows
    first, then where another kernel becomes the fastest, until the seconds are over; what MLX
    compiles does not count. Writes what `select` reads, in the user's cache folder unless told
    otherwise.
    """
    check(shapes, rows, rounds, seconds)
    path = default_path() if output is None else Path(output)
    check_target(path)
    names = available(CHOICES).names
    points = list(measured(names, shapes, sorted(set(rows)), rounds, seconds, say))
    points.sort(key=lambda point: (point.shape, point.rows))
    if not points:
        raise UserError(f"none of the kernels {', '.join(names)} runs here: nothing was measured")
    write_json(path, described(points, datetime.date.today().isoformat()))
    return points


def check(
    shapes: Sequence[tuple[int, int]], rows: Sequence[int], rounds: int, seconds: float
) -> None:
    """Raises for what cannot be measured."""
    for N, K in shapes:
        if N < 1 or K < 1 or K % PACKED_COLUMNS:
            raise UserError(
                f"--shape {N}x{K} is not possible; valid: outputs x inputs, inputs a multiple of "
                f"{PACKED_COLUMNS}"
            )
    for option, least in (("--rows", min(rows)), ("--rounds", rounds)):
        if least < 1:
            raise UserError(f"{option} {least} is not possible; valid: 1 or more")
    for N, K in shapes:
        needed = 4 * (3 * N * K + 2 * max(rows) * (N + K))  # a layer made, its input and output
        require_memory(
            needed,
            f"{N}x{K} with {max(rows)} rows takes about {human_bytes(needed)}",
            "give smaller ones by --shape and --rows",
        )
    if not seconds > 0:
        raise UserError(f"--seconds {seconds:g} is not possible; valid: above 0")


def check_target(path: Path) -> None:
    """Raises where the file could not be written, before anything is measured."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file to write")
    require_writable(path.parent)


def say(line: str) -> None:
    click.echo(f"note: {line}", err=True)


def shape_of(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise UserError(f"--shape {text} is not possible; valid: outputs x inputs, such as 1536x64")
    return int(found[1]), int(found[2])


@command()
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    help="Outputs x inputs; repeat it.  [nano's, SD3's, 256x256]",
)
@click.option("--rows", type=int, multiple=True, help="Tokens; repeat it.  [1 to 8192]")
@click.option("--rounds", default=5, help="How often everything is measured.")
@click.option("--seconds", default=50.0, help="Of measuring, without what is compiled.")
@click.option("--output", help="File to write.  [in the user's cache folder]")
def main(
    shapes: tuple[str, ...],
    rows: tuple[int, ...],
    rounds: int,
    seconds: float,
    output: str | None,
) -> None:
    """Measure which kernel is the fastest here; later runs choose by that.

    \b
    Example:
      ditq tune
    """
    start = time.perf_counter()
    wanted = [shape_of(text) for text in shapes] or SHAPES
    points = tune(output, shapes=wanted, rows=rows or ROWS, rounds=rounds, seconds=seconds)
    click.echo("\n".join(lines_of(points)))
    taken = time.perf_counter() - start
    click.echo(f"measured {len(points)} sizes in {taken:.1f} s: wrote {output or default_path()}")


if __name__ == "__main__":
    main()
