"""What was measured: as JSON for programs, as a table and a plot for people."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import __version__
from ..backends import Device, device_name
from ..cli import memory_bytes
from ..errors import UserError
from ..store import human_bytes, require_writable, short_hash, write_bytes, write_json
from .plots import plot_rows
from .rows import FLOAT
from .timing import ratios, spread
from .work import Benchmark, Measured

FORMAT, VERSION = "ditq-benchmark", 1
NUMBERS, PAGE, PLOT = "benchmark.json", "benchmark.md", "benchmark.png"


def check_target(output: Path, force: bool) -> None:
    """Raises where something could not be written, or would replace finished work."""
    require_writable(output)
    if (path := output / NUMBERS).exists() and not force:
        raise UserError(f"{path} is there already; give another name, or --force to replace it")


def machine() -> dict[str, Any]:
    """What it was measured on."""
    return {
        "device": device_name(),
        "kind": Device.here().kind,
        "cores": os.cpu_count(),
        "memory": memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "ditq": __version__,
    }


def figures_of(benchmark: Benchmark, model: dict[str, Any]) -> dict[str, Any]:
    """Everything in numbers; seconds and bytes. `model` says what was drawn with."""
    job, first = benchmark.job, benchmark.measured[0]
    data = {
        "machine": machine(),
        "model": model,
        "pictures": {
            "batch size": job.batch_size,
            "steps": job.num_steps,
            "guidance": job.cfg_weight,
            "size": [job.height, job.width],
        },
        "warm_up": benchmark.rounds.warm_up,
        "repeats": benchmark.rounds.repeats,
        "rows": [row_figures(measured, first, job.batch_size) for measured in benchmark.measured],
        "left_out": benchmark.left_out,
        "notes": benchmark.notes,
    }
    data["slower"] = slower(data["rows"])
    return data


def row_figures(measured: Measured, first: Measured, batch_size: int) -> dict[str, Any]:
    """One row; ratios are those of the same round."""
    row, seconds = measured.row, [batch.seconds / batch_size for batch in measured.drawn]
    picture = spread(seconds)
    return {
        "name": row.name,
        "kind": row.spec.kind,
        "kernel": row.spec.kernel,
        "modulated": row.spec.modulated,
        "step_seconds": spread([s for batch in measured.drawn for s in batch.steps]),
        "picture_seconds": picture | {"each": seconds},
        "pictures_a_second": 1 / picture["median"],
        "ratio": ratios(step_medians(measured), step_medians(first)),
        "held_bytes": row.held,
        "peak_bytes": row.held + max(batch.bytes for batch in measured.drawn),
    }


def step_medians(measured: Measured) -> list[float]:
    """One a round."""
    return [float(np.median(batch.steps)) for batch in measured.drawn]


def slower(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for every quantized row whose step takes longer than the first row's."""
    first, sentences = rows[0]["name"], []
    for row in rows[1:]:
        ratio = row["ratio"]
        if row["kind"] == FLOAT or ratio["median"] <= 1:
            continue
        low, high = ratio["quartiles"]
        text = (
            f"{row['name']} is slower than {first}: a step takes {ratio['median']:.2f} times as "
            f"long (middle half of the rounds {low:.2f} to {high:.2f})"
        )
        sentences.append(text + ("; that may be chance" if low <= 1 else ""))
    return sentences


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown."""
    head = ["", "ms a step", "middle half", f"times {rows[0]['name']}", "middle half"]
    head += ["s a picture", "pictures a second", "held", "peak"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        step, ratio = row["step_seconds"], row["ratio"]
        cells = [row["name"], f"{1e3 * step['median']:.2f}", span(step["quartiles"], 1e3)]
        cells += [f"{ratio['median']:.2f}", span(ratio["quartiles"])]
        cells += [f"{row['picture_seconds']['median']:.3f}", f"{row['pictures_a_second']:.3g}"]
        lines.append([*cells, human_bytes(row["held_bytes"]), human_bytes(row["peak_bytes"])])
    return [f"| {' | '.join(cells)} |" for cells in lines]


def span(bounds: Sequence[float], unit: float = 1) -> str:
    return " to ".join(f"{unit * bound:.2f}" for bound in bounds)


def page_lines(data: dict[str, Any]) -> list[str]:
    """Markdown, without the plot."""
    where, drawn = data["machine"], data["pictures"]
    height, width = drawn["size"]
    lines = [
        f"- Device: {where['device']} ({where['kind']}), {where['cores']} cores, "
        f"{human_bytes(where['memory'])}, {where['system']}, MLX {where['mlx']}",
        model_line(data["model"]),
        f"- Pictures: {height}x{width}, {drawn['batch size']} at once, {drawn['steps']} steps, "
        f"guidance {drawn['guidance']:g}",
        f"- {data['repeats']} rounds after {data['warm_up']} to warm up, in each of which every "
        "row draws once",
        *(f"- Not run: {name}: {reason}" for name, reason in data["left_out"].items()),
        *(f"- Note: {note}" for note in data["notes"]),
        "",
        *table(data["rows"]),
        "",
    ]
    if data["slower"]:
        return lines + [f"- {sentence}" for sentence in data["slower"]] + [""]
    if all(row["kind"] == FLOAT for row in data["rows"]):
        return [*lines, "No quantized row was run.", ""]
    return [*lines, f"No quantized row is slower than {data['rows'][0]['name']}.", ""]


def model_line(model: dict[str, Any]) -> str:
    return (
        f"- Model: {model['name']} ({short_hash(model['sha256'])}), weights: {model['weights']}, "
        f"activation scales: {model['activation scales']}"
    )


def write_all(data: dict[str, Any], output: Path) -> list[Path]:
    """Plot, Markdown, and the JSON last."""
    output.mkdir(parents=True, exist_ok=True)
    plot_rows(data, output / PLOT)
    lines = ["# Benchmark", "", *page_lines(data), f"![benchmark]({PLOT})", ""]
    write_bytes(output / PAGE, "\n".join(lines).encode())
    write_json(output / NUMBERS, {"format": FORMAT, "version": VERSION, **data})
    return [output / NUMBERS, output / PAGE, output / PLOT]


def headline(data: dict[str, Any]) -> str:
    """The fastest quantized row, for the last line."""
    first, *others = data["rows"]
    quantized = [row for row in others if row["kind"] != FLOAT]
    text = f"{first['name']}: {1e3 * first['step_seconds']['median']:.2f} ms a step"
    if not quantized:
        return f"{text}; no quantized row was run"
    best = min(quantized, key=lambda row: row["ratio"]["median"])
    text += f"; fastest quantized: {best['name']}, {best['ratio']['median']:.2f} times that"
    return f"{text}; {len(data['slower'])} of {len(quantized)} are slower"
