"""From how many rows on which backend is the fastest: as shipped, or as `ditq tune` has measured.

Measured is the whole layer: input to codes, product, bias. A table that was measured holds for the
device and the MLX that it was measured with; anything else is left aside with a note.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import UserError
from ..store import read_json
from .device import HOPPER, M5, Device, device_name

FORMAT, VERSION = "ditq-tuning", 1
SWITCH = "DITQ_TUNING"  # "off", or the file
HINT = "run `ditq tune` again"
# Those that are chosen without being named; the first one unless another is faster by MARGIN. The
# others take less memory and more time, or are for comparison.
USUAL = "dense"
FLOATS = (USUAL, "quantized_matmul")  # that take floats and scales of groups too
CHOICES = (*FLOATS, "cuda_int8", "metal_int8")
MARGIN = 1.05

Shape = tuple[int, int]  # N, K
Crossovers = tuple[tuple[int, str], ...]  # rows, rising, and the backend from there on
Table = Mapping[Shape, Crossovers]


@dataclass(frozen=True)
class Point:
    """Seconds of a layer under each backend that was measured."""

    rows: int
    N: int
    K: int
    seconds: Mapping[str, float]

    @property
    def shape(self) -> Shape:
        return self.N, self.K


FEW_ROWS = 32  # below it, reading the weights takes longer than multiplying
COMMON: Crossovers = ((1, "quantized_matmul"), (FEW_ROWS, USUAL))
SMALL: Shape = (192, 192)
LARGE: tuple[Shape, ...] = ((1536, 1536), (6144, 1536), (1536, 6144))
# A whole step of SD3 gains with its 308 tokens of text too, as what surrounds them is spared; by
# themselves these shapes gained from 8 rows on (docs/benchmarks/tuning.json).
HOPPERS: Table = {SMALL: COMMON} | dict.fromkeys(LARGE, (*COMMON, (256, "cuda_int8")))

# From 512 rows on, whole tiles of integers are multiplied faster than floats.
M5S: Crossovers = ((1, "quantized_matmul"), (512, "metal_int8"))


def shipped(device: Device, integers: bool = True) -> Table:
    """Without a measurement; integer kernels only where they were seen to be faster."""
    if device.kind == "cpu":
        return {SMALL: ((1, USUAL),)}
    if device.kind == "metal" and device.generation >= M5:
        return {SMALL: M5S if integers else M5S[:1]}
    if device.kind == "cuda" and device.generation == HOPPER and integers:
        return HOPPERS
    return {SMALL: COMMON}


def chosen(table: Table, rows: int, N: int, K: int) -> str:
    """The name of the backend for so many rows."""
    return [name for start, name in table[nearest(table, N, K)] if start <= max(1, rows)][-1]


def nearest(table: Table, N: int, K: int) -> Shape:
    """The largest known shape that is no larger either way: what wins there wins here. Where there
    is none, the smallest."""
    below = [shape for shape in table if shape[0] <= N and shape[1] <= K]
    if below:
        return max(below, key=lambda shape: (shape[0] * shape[1], shape))
    return min(table, key=lambda shape: (shape[0] * shape[1], shape))


def table_of(points: Sequence[Point], names: Sequence[str] = CHOICES) -> Table:
    """Every measured shape's crossovers between the backends of these names."""
    shapes = sorted({point.shape for point in points})
    return {shape: crossovers([p for p in points if p.shape == shape], names) for shape in shapes}


def crossovers(points: Sequence[Point], names: Sequence[str] = CHOICES) -> Crossovers:
    """Of one shape. Between two measured numbers of rows the backend holds that loses less at
    either of them; beyond the last, and before the first, what was measured there."""
    ordered = [point.seconds for point in sorted(points, key=lambda point: point.rows)]
    starts = [1, *sorted(point.rows for point in points)]
    found: dict[int, str] = {}
    for start, ends in zip(starts, [ordered[:1], *pairs(ordered)], strict=True):
        found[start] = best(ends, names)
    kept, last = [], None
    for start, name in found.items():
        if name != last:
            kept.append((start, name))
        last = name
    return tuple(kept)


def pairs(ordered: list[Mapping[str, float]]) -> list[list[Mapping[str, float]]]:
    """Each with the next; the last alone."""
    return [ordered[i : i + 2] for i in range(len(ordered))]


def best(ends: Sequence[Mapping[str, float]], names: Sequence[str]) -> str:
    """The one that loses least where it loses most, against the fastest; the usual one unless it
    loses MARGIN more. What was not measured at one end is not chosen."""
    names = [name for name in names if all(name in seconds for seconds in ends)]
    if not names:
        return USUAL

    def loss(name: str) -> float:
        return max(seconds[name] / min(seconds[n] for n in names) for seconds in ends)

    least = min(names, key=loss)
    return USUAL if USUAL in names and loss(USUAL) <= MARGIN * loss(least) else least


# --- what was measured


@dataclass(frozen=True)
class Tuned:
    """What `ditq tune` has found on this machine."""

    points: Sequence[Point]
    date: str

    def table(self, integers: bool) -> Table:
        return table_of(self.points, CHOICES if integers else FLOATS)


def kind_and_name() -> str:
    """Such as "cuda NVIDIA H200"."""
    return f"{Device.here().kind} {device_name()}"


def default_path() -> Path:
    """In the user's cache folder, a file a device."""
    choice = os.environ.get(SWITCH, "")
    if choice not in ("", "off"):
        return Path(choice)
    name = re.sub(r"[^a-z0-9]+", "-", kind_and_name().lower()).strip("-")
    return cache_folder() / f"tuning-{name}.json"


def cache_folder() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ditq"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditq"


def described(points: Sequence[Point], date: str) -> dict[str, Any]:
    """What the file says."""
    head = {"format": FORMAT, "version": VERSION, "date": date}
    return head | {
        "device": kind_and_name(),
        "mlx": mx.__version__,
        "points": [{**vars(point), "seconds": dict(point.seconds)} for point in points],
    }


def read_tuned(path: Path) -> Tuned:
    """The file's table; one that is damaged, or of another device or MLX, is an error."""
    data = read_json(path, FORMAT, VERSION, HINT)
    for key, here in (("device", kind_and_name()), ("mlx", mx.__version__)):
        if data.get(key) != here:
            raise UserError(f"{path} was measured with {key} {data.get(key)}, here is {here}")
    try:
        points = [Point(**{**point, "seconds": dict(point["seconds"])}) for point in data["points"]]
        sound = bool(points) and all(is_sound(point) for point in points)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged: it does not say what was measured")
    return Tuned(points, str(data.get("date")))


def is_sound(point: Point) -> bool:
    sizes = (point.rows, point.N, point.K)
    times = point.seconds.values()
    return all(type(size) is int and size > 0 for size in sizes) and all(
        type(time) is float and time > 0 for time in times
    )


def look_up() -> tuple[Tuned | None, str]:
    """What was measured here, and one line about it."""
    if os.environ.get(SWITCH) == "off":
        return None, f"as shipped ({SWITCH}=off)"
    path = default_path()
    if not path.exists() and os.environ.get(SWITCH):
        return None, f"as shipped, since {path} ({SWITCH}) is missing; `ditq tune` writes it"
    if not path.exists():
        return None, "as shipped; `ditq tune` measures this machine"
    try:
        tuned = read_tuned(path)
    except (UserError, OSError) as error:
        return None, f"as shipped, since {' '.join(str(error).split())}; {HINT}"
    return tuned, f"measured on {tuned.date} ({path})"


def status() -> str:
    """One line for `ditq doctor`: by what kernels are chosen."""
    return look_up()[1]


@cache
def tuned_here() -> Tuned | None:
    """What was measured here, read once a process; a file that is no use is said so then."""
    tuned, words = look_up()
    if words.startswith("as shipped, since"):
        print(f"note: kernels are chosen {words}", file=sys.stderr)
    return tuned


@cache
def table_for(device: Device, integers: bool = True) -> Table:
    """The measured table of this machine's device, the shipped one of any other."""
    tuned = tuned_here() if device == Device.here() else None
    return shipped(device, integers) if tuned is None else tuned.table(integers)
