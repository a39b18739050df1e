"""A guided step from 512 to 1536 pixels and 1 to 8 pictures: 16 bits, MLX's 4 bits, W8A8 and W4A8,
with and without low memory. Random weights.

    python -m tools.bench_int8_sizes [--model sd3-medium --model sd3.5-large]

Writes docs/benchmarks/int8_sizes.json, int8_sizes.md and int8_sizes.png; with --dry-run nothing.
The most wanted sizes come first, and all but the plot is written after each of them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.backends import device_name, staying_packed
from src.benchmarking.plots import number
from src.benchmarking.subjects import with_layers
from src.benchmarking.timing import in_turns, ratios, refusal_of, seconds_of, spread
from src.inference.kernels import TEXT_TOKENS
from src.inference.low_memory import low_memory, released_tensors
from src.models.configs import config_named
from src.models.mmdit import MMDiT
from src.models.pipeline import Pipeline
from src.report.plots import WIDTH, plain_style, save

import click
import mlx.core as mx
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.bench_common import FOLDER, machine, write_report
from tools.int8_models import (
    BASE,
    MLX4,
    STEPS,
    Inputs,
    Model,
    Work,
    held_bytes,
    inputs_of,
    kernels_of,
    model_of,
    peak_of,
    step_of,
    work_of,
)

MODELS, PIXELS, PICTURES = ("sd3-medium", "sd3.5-large"), (512, 1024, 1536), (1, 2, 4, 8)
SPELL = 2.5  # seconds for more rounds than one
MAKING = 3.0  # seconds that a row's layers may take
NO_TIME = "no time was left"
# Dense, in 10¹² multiplications and additions a second: NVIDIA's data sheets.
INTEGERS, FLOATS = "int8", "16 bits"
PEAKS = {
    "NVIDIA H200": {INTEGERS: 1979.0, FLOATS: 989.0},
    "NVIDIA H100 80GB HBM3": {INTEGERS: 1979.0, FLOATS: 989.0},
}
ROOM, MARGIN = 1.08, 96  # of the plot: above the highest point, and pixels beside the sides
INTEGER_KERNELS = {"cuda_int8", "cuda_int8_packed", "metal_int8"}
STYLES = {  # colour and line of the plot
    "W4A8, as chosen": ("#33658a", "-"),
    "W8A8, as chosen": ("#4c9f70", "-"),
    MLX4: ("#8d99ae", "-"),
    "W4A8, low memory": ("#33658a", "--"),
    "16 bits, low memory": ("#c8553d", "--"),
    "W8A8, low memory": ("#4c9f70", "--"),
    f"{MLX4}, low memory": ("#8d99ae", "--"),
}


@dataclass(frozen=True)
class Row:
    """`bits`: of the codes whose kernels are chosen by size, where there are such."""

    name: str
    make: Callable[[Model], Pipeline]
    bits: int | None = None
    low_memory: bool = False


# The most wanted first.
ROWS = (
    Row(BASE, lambda model: model.exact),
    Row("W4A8, as chosen", lambda model: model.over(4, None), bits=4),
    Row("W8A8, as chosen", lambda model: model.over(8, None), bits=8),
    Row(MLX4, lambda model: model.in_mlx4()),
    Row("W4A8, low memory", lambda model: model.over(4, staying_packed()), low_memory=True),
    Row("16 bits, low memory", lambda model: with_layers(model.exact, {}), low_memory=True),
    Row("W8A8, low memory", lambda model: model.over(8, staying_packed()), low_memory=True),
    Row(f"{MLX4}, low memory", lambda model: model.in_mlx4(), low_memory=True),
)


@dataclass
class Bench:
    """One model, what was made of it, and how fast its rows were last."""

    model: Model
    rounds: int
    end: float  # by the clock that never goes back
    made: dict[str, tuple[tuple[str, ...], Pipeline, int]] = field(default_factory=dict)
    paces: dict[str, float] = field(default_factory=dict)  # seconds a multiply-add

    def pipeline(self, row: Row) -> tuple[Pipeline, int]:
        """And the bytes that it holds, without what low memory lets go; made again only where the
        size wants other kernels."""
        key = () if row.bits is None else self.model.chosen(row.bits)
        if row.name not in self.made or self.made[row.name][0] != key:
            self.made.pop(row.name, None)
            made = row.make(self.model)
            # Weights that other rows need stay, and are not counted.
            released = released_tensors(made.transformer) if row.low_memory else ()
            self.made[row.name] = key, made, held_bytes(made.transformer, released)
        return self.made[row.name][1:]

    def expected(self, row: Row, work: Work) -> float:
        """Seconds of a step; 0 where nothing is known yet."""
        return self.paces.get(row.name, 0.0) * counted(row, work)

    def fits(self, rows: list[Row], work: Work) -> bool:
        """Whether there is time to prepare the last of the rows and to run a round of them all."""
        making = 0.0 if rows[-1].name in self.made else MAKING
        seconds = [self.expected(row, work) for row in rows]
        return time.monotonic() + making + seconds[-1] + sum(seconds) <= self.end

    def measure(self, pixels: int, pictures: int) -> dict[str, Any]:
        """All rows at one size, in turns."""
        work = work_of(self.model.exact.transformer.config, pixels, pictures)
        self.model.draw_at(pixels)
        inputs = inputs_of(self.model, pixels, pictures)
        found: dict[str, Any] = {"pixels": pixels, "pictures": pictures, "tokens": inputs.tokens}
        found |= {"multiply_adds": vars(work), "rows": {}, "left_out": {}}
        calls: dict[str, Callable[[], mx.array]] = {}
        taken: list[Row] = []
        for row in ROWS:
            if not self.fits([*taken, row], work):
                found["left_out"][row.name] = NO_TIME
                continue
            reason = refusal_of(lambda row=row: prepare(self, row, inputs, found["rows"], calls))
            if reason:
                found["left_out"][row.name] = reason
                mx.clear_cache()
            else:
                taken.append(row)
        seconds = timed(calls, self.rounds)
        for row in taken:
            own, first = seconds[row.name], seconds.get(BASE)
            self.paces[row.name] = spread(own)["median"] / counted(row, work)
            entry = found["rows"][row.name]
            entry |= {"rounds": len(own), **spread(own), **reached(row, entry, work, own)}
            entry["faster"] = 1 / ratios(own, first)["median"] if first else None
        return found


def prepare(
    bench: Bench,
    row: Row,
    inputs: Inputs,
    entries: dict[str, dict[str, Any]],
    calls: dict[str, Callable[[], mx.array]],
) -> None:
    """Runs a step once; what it took goes to the entries, itself to the calls."""
    pipeline, held = bench.pipeline(row)
    transformer = pipeline.transformer
    tensors = released_tensors(bench.model.exact.transformer)
    if row.low_memory:
        held += vector_bytes(transformer, inputs, pipeline.dtype)
    with low_memory(pipeline, lambda: tensors) if row.low_memory else nullcontext():
        call = step_of(pipeline, inputs)
    peak = peak_of(call)
    entries[row.name] = {"held": held, "peak": peak, "kernels": kernels_of(transformer)}
    calls[row.name] = call


def vector_bytes(transformer: MMDiT, inputs: Inputs, dtype: mx.Dtype) -> int:
    """Of what all modulations give at all steps."""
    outputs = sum(len(m.layers[1].weight) for m in transformer.modulation_layers().values())
    return STEPS * len(inputs.conditioning.pooled) * outputs * dtype.size


def timed(calls: dict[str, Callable[[], mx.array]], rounds: int) -> dict[str, list[float]]:
    """Seconds of at most so many rounds, of fewer where they take long. The first one warms up,
    unless there is time for no other."""
    clocks = {name: seconds_of(call) for name, call in calls.items()}
    first = in_turns(clocks, 1)
    turn = sum(seconds[0] for seconds in first.values())
    more = min(rounds, int(SPELL / turn)) if turn else 0
    return in_turns(clocks, more) if more else first


def counted(row: Row, work: Work) -> int:
    """Multiply-adds of the row's step, in which modulation is not where it is computed ahead."""
    modulation = 0 if row.low_memory else work.modulation
    return work.linears + work.attention + modulation


def reached(row: Row, entry: dict[str, Any], work: Work, seconds: list[float]) -> dict[str, Any]:
    """Tera-operations a second, and their share of the device's peak, none where that is not
    known."""
    tops = 2e-12 * counted(row, work) / spread(seconds)["median"]
    kind = INTEGERS if INTEGER_KERNELS & set(entry["kernels"]) else FLOATS
    peak = PEAKS.get(device_name(), {}).get(kind)
    return {"tops": tops, "format": kind, "share": tops / peak if peak else None}


def sizes_of(pixels: tuple[int, ...], pictures: tuple[int, ...]) -> list[tuple[int, int]]:
    """Pixels and pictures, few pictures first."""
    return [(side, count) for count in sorted(set(pictures)) for side in sorted(set(pixels))]


def measured(
    name: str, sizes: list[tuple[int, int]], rounds: int, end: float, found: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Every size's figures, which are in `found` too as soon as they are there."""
    begun = time.monotonic()
    model = model_of(name)
    found["dtype"] = str(model.exact.dtype)
    found["seconds_to_make"] = time.monotonic() - begun
    bench = Bench(model, rounds, end)
    for pixels, pictures in sizes:
        found["sizes"].append(bench.measure(pixels, pictures))
        gc.collect()
        mx.clear_cache()
        yield found["sizes"][-1]


# --- the report


def title_of(size: dict[str, Any]) -> str:
    count = size["pictures"]
    return f"{size['pixels']} pixels, {count} picture{'s' if count > 1 else ''}"


def progress_of(name: str, size: dict[str, Any]) -> str:
    times = "; ".join(f"{n} {1e3 * row['median']:.1f}" for n, row in size["rows"].items())
    left_out = f"; left out: {', '.join(size['left_out'])}" if size["left_out"] else ""
    return f"{name}, {title_of(size)}, ms: {times or 'nothing'}{left_out}"


def lines_of(data: dict[str, Any], picture: str | None) -> list[str]:
    lines = [
        f"One guided step (a batch of 2 for each picture, {TEXT_TOKENS} text tokens, random",
        "weights), as the pipeline runs it. Held are the transformer's arrays, peak what a step",
        "takes on top of them. Times are medians of rounds in which all rows take turns, of one",
        "round where that takes seconds; `times` is the median ratio within the rounds. Kernels",
        "are chosen for one picture of the size, however many are drawn.",
        "",
        "Low memory is `--low-memory`: weights stay packed, and the modulation is computed",
        f"for all {STEPS} steps ahead: what it gave is held instead of its weights, and the step",
        "does without it.",
        "",
        "TOPS are 2 times the multiply-adds of block linears, attention and modulation, counted",
        "from the shapes, over the step's time; embedders, norms, GELU and the final layer are not",
        "counted.",
    ]
    if peaks := data["peaks"]:
        lines += [
            f"The share is of the device's peak, {peaks[INTEGERS]:.0f} for int8 and "
            f"{peaks[FLOATS]:.0f} for 16 bits,",
            "in the format of the row's linears: int8 where an integer kernel multiplies any of",
            "them. Attention, and linears that `dense` multiplies, are in 16 bits there too, so",
            "such a row cannot reach the whole of it.",
        ]
    if picture is not None:
        lines += ["", f"![Times as fast as 16 bits, by size and pictures]({picture})"]
    for name, found in data["models"].items():
        lines += ["", f"## {name}, {found.get('dtype', 'not reached')}"]
        for size in found["sizes"]:
            lines += ["", f"### {title_of(size)}", "", *table_of(size, bool(peaks))]
    return lines


def table_of(size: dict[str, Any], with_share: bool) -> list[str]:
    heads = ["ms", "times 16 bits", "held GB", "peak GB", "TOPS"]
    heads += ["share of peak"] * with_share
    lines = [f"| | {' | '.join(heads)} | kernels |", f"|---|{'---:|' * len(heads)}---|"]
    for name, row in size["rows"].items():
        faster = "" if row["faster"] is None else f"{row['faster']:.2f}"
        cells = [f"{1e3 * row['median']:.2f}", faster]
        cells += [f"{row[key] / 1e9:.2f}" for key in ("held", "peak")] + [number(row["tops"])]
        cells += [f"{100 * row['share']:.0f} %"] if with_share else []
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in sorted(row["kernels"].items()))
        lines.append(f"| {name} | {' | '.join(cells)} | {kernels} |")
    reasons: dict[str, list[str]] = {}
    for name, why in size["left_out"].items():
        reasons.setdefault(why, []).append(name)
    return [*lines, *(f"\nLeft out: {'; '.join(n)}: {why}." for why, n in reasons.items())]


def plot_sizes(data: dict[str, Any], path: Path) -> None:
    """Times as fast as 16 bits over the side: a row of panels a model, one of them a batch."""
    models = {name: found["sizes"] for name, found in data["models"].items() if found["sizes"]}
    counts = sorted({size["pictures"] for sizes in models.values() for size in sizes})
    with plain_style():
        height = 0.9 + 2.1 * len(models)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        grid = figure.subplots(len(models), len(counts), sharey=True, sharex=True, squeeze=False)
        for row, (name, sizes) in zip(grid, models.items(), strict=True):
            for axes, count in zip(row, counts, strict=True):
                draw_panel(axes, [size for size in sizes if size["pictures"] == count])
                axes.set_title(f"{name}, {count} picture{'s' if count > 1 else ''}", fontsize=9)
            row[0].set_ylabel("times as fast as 16 bits")
        for axes in grid[-1]:
            axes.set_xlabel("pixels a side")
        # Shared by all panels, so it is said once, when all is drawn.
        grid[0][0].set_ylim(0, highest(models) * ROOM)
        sides = sorted({size["pixels"] for sizes in models.values() for size in sizes})
        grid[0][0].set_xticks(sides)
        grid[0][0].set_xlim(sides[0] - MARGIN, sides[-1] + MARGIN)
        for name, (colour, line) in STYLES.items():
            grid[0][0].plot([], [], line, color=colour, marker="o", markersize=3, label=name)
        figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        figure.suptitle(f"A guided step on {data['machine']['device']}", fontsize=10)
        save(figure, path)


def highest(models: dict[str, list[dict[str, Any]]]) -> float:
    """Of all that is drawn, the line of 16 bits included."""
    rows = [row for sizes in models.values() for size in sizes for row in size["rows"].values()]
    return max([1.0, *(row["faster"] or 0.0 for row in rows)])


def draw_panel(axes: Axes, sizes: list[dict[str, Any]]) -> None:
    for name, (colour, line) in STYLES.items():
        rows = [(size["pixels"], size["rows"].get(name, {}).get("faster")) for size in sizes]
        places = [(pixels, faster) for pixels, faster in rows if faster is not None]
        if places:
            axes.plot(*zip(*places, strict=True), line, color=colour, marker="o", markersize=3)
    if not any(size["rows"] for size in sizes):
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, fontsize=8)
    axes.axhline(1, color="black", linewidth=0.6, alpha=0.6)
    axes.spines.right.set_visible(False)


@click.command()
@click.option("--model", "models", multiple=True, help=f"Shape.  [{', '.join(MODELS)}]")
@click.option("--pixels", multiple=True, type=int, help="Side of the picture.  [512, 1024, 1536]")
@click.option("--pictures", multiple=True, type=int, help="Drawn at once.  [1, 2, 4, 8]")
@click.option("--rounds", default=5, help="At most; one where it takes seconds.")
@click.option("--seconds", default=300.0, help="Of the whole run; then rows are left out.")
@click.option("--name", default="int8_sizes", help="Of the report.")
@click.option("--note", default="", help="What else the machine did meanwhile, for the report.")
@click.option("--dry-run", is_flag=True, help="Only print.")
def main(
    models: tuple[str, ...],
    pixels: tuple[int, ...],
    pictures: tuple[int, ...],
    rounds: int,
    seconds: float,
    name: str,
    note: str,
    dry_run: bool,
) -> None:
    """Time whole steps at all sizes."""
    begun, models = time.monotonic(), models or MODELS
    for shape in models:
        config_named(shape)
    sizes, peaks = sizes_of(pixels or PIXELS, pictures or PICTURES), PEAKS.get(device_name())
    data: dict[str, Any] = {"machine": machine(), "note": note, "peaks": peaks, "models": {}}
    for place, shape in enumerate(models):
        now = time.monotonic()
        end = now + (begun + seconds - now) / (len(models) - place)
        data["models"][shape] = {"sizes": []}
        for size in measured(shape, sizes, rounds, end, data["models"][shape]):
            click.echo(f"{time.monotonic() - begun:.0f} s: {progress_of(shape, size)}", err=True)
            if not dry_run:
                write(name, data, None)
        gc.collect()
        mx.clear_cache()
    if not dry_run:
        plot_sizes(data, FOLDER / f"{name}.png")
        write(name, data, f"{name}.png")
    click.echo("\n".join(lines_of(data, None)))
    click.echo(f"\n{time.monotonic() - begun:.0f} s")


def write(name: str, data: dict[str, Any], picture: str | None) -> None:
    write_report(name, "Whole steps on codes, by size", data, lines_of(data, picture))


if __name__ == "__main__":
    main()
