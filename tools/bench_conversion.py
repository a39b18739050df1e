"""Time, memory and sizes of converting a checkpoint that is larger than what may be in memory.

    python -m tools.bench_conversion [--gigabytes 8] [--work FOLDER]

Writes docs/benchmarks/conversion.json and conversion.md. The checkpoint has the names of FLUX and
random bfloat16 weights; it is made piece by piece in a temporary folder. Copying it, synced to the
disk as a conversion is, takes turns with converting it, each in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from src.conversion.layers import Selection
from src.conversion.plan import make_plan
from src.conversion.reading import open_source
from src.store import TensorInfo, require_space, stream_tensors

import click
import numpy as np

from tools.bench_common import machine, write_report

HIDDEN = 3072
PIECE_VALUES = 2**21
MEMORY_ALLOWANCE = 200 * 10**6  # on top of twice the largest tensor
SHAPES = {
    "attn.to_q": (HIDDEN, HIDDEN),
    "attn.to_k": (HIDDEN, HIDDEN),
    "attn.to_v": (HIDDEN, HIDDEN),
    "attn.to_out.0": (HIDDEN, HIDDEN),
    "ff.net.0.proj": (4 * HIDDEN, HIDDEN),
    "ff.net.2": (HIDDEN, 4 * HIDDEN),
    "norm1.linear": (6 * HIDDEN, HIDDEN),
}

# On Linux the process's own peak: what getrusage tells may be that of the process that started it.
CONVERSION = """
import re, resource, sys
from pathlib import Path
from src.convert_to_int8 import convert_to_int8
convert_to_int8(sys.argv[1], sys.argv[2], quiet=True)
status = Path("/proc/self/status")
if status.exists():
    print(1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read_text())[1]))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def tensors_of(total_bytes: int) -> dict[str, TensorInfo]:
    """Whole blocks of at least `total_bytes` together."""
    tensors: dict[str, TensorInfo] = {}
    block = 0
    while sum(info.nbytes for info in tensors.values()) < total_bytes:
        for path, (rows, columns) in SHAPES.items():
            name = f"transformer_blocks.{block}.{path}"
            tensors[f"{name}.weight"] = bfloat16(rows, columns)
            tensors[f"{name}.bias"] = bfloat16(rows)
        block += 1
    return tensors


def bfloat16(*shape: int) -> TensorInfo:
    return TensorInfo("bfloat16", shape, 2 * int(np.prod(shape)))


def make_checkpoint(path: Path, tensors: dict[str, TensorInfo]) -> None:
    """Gaussian weights, of which a piece is repeated: rounding does not care."""
    values = np.random.default_rng(0).standard_normal(PIECE_VALUES).astype(np.float32)
    piece = ((0.02 * values).view(np.uint32) >> 16).astype(np.uint16)
    with stream_tensors(path, tensors, {"format": "pt"}) as writer:
        for name, info in tensors.items():
            for begin in range(0, info.nbytes // 2, piece.size):
                writer.write(name, piece[: info.nbytes // 2 - begin])


def copy(source: Path, target: Path) -> float:
    """Seconds until a copy is on the disk."""
    start = time.perf_counter()
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start


def convert(source: Path, target: Path) -> tuple[float, int]:
    """Seconds, Python's start included, and the most bytes that the process held."""
    command = [sys.executable, "-c", CONVERSION, str(source), str(target)]
    start = time.perf_counter()
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return time.perf_counter() - start, int(printed)


def measured(folder: Path, total_bytes: int, repeats: int) -> dict[str, Any]:
    source, target = folder / "source.safetensors", folder / "target.safetensors"
    tensors = tensors_of(total_bytes)
    require_space(folder, 2 * sum(info.nbytes for info in tensors.values()), "the benchmark")
    make_checkpoint(source, tensors)
    copying, converting, peaks = [], [], []
    for _ in range(repeats):
        copying.append(copy(source, target))
        target.unlink()
        seconds, peak = convert(source, target)
        converting.append(seconds)
        peaks.append(peak)
        size = target.stat().st_size
        target.unlink()
    with open_source(source) as opened:
        before, after = make_plan(opened, Selection()).converted_bytes
    return {
        "tensors": len(tensors),
        "bytes_before": source.stat().st_size,
        "bytes_after": size,
        "converted_bytes_before": before,
        "converted_bytes_after": after,
        "largest_tensor_bytes": max(info.nbytes for info in tensors.values()),
        "copy_seconds": copying,
        "convert_seconds": converting,
        "peak_bytes": max(peaks),
    }


def lines_of(found: dict[str, Any]) -> list[str]:
    """The report's text."""
    allowed = 2 * found["largest_tensor_bytes"] + MEMORY_ALLOWANCE
    copying, converting = (
        statistics.median(found[f"{what}_seconds"]) for what in ("copy", "convert")
    )
    layers = found["converted_bytes_after"] / found["converted_bytes_before"]
    return [
        f"A bfloat16 checkpoint of {found['bytes_before'] / 1e9:.2f} GB with the names of FLUX,",
        f"{found['tensors']} tensors, to INT8 in blocks of 128. Medians of",
        f"{len(found['copy_seconds'])} turns; the ratio is of each turn's two times. Copying and",
        "converting end with the data synced to the disk; converting includes Python's start.",
        "",
        "| | measured | wanted |",
        "|---|---:|---:|",
        f"| converted layers, share of 16 bits | {100 * layers:.1f} % | at most 52 % |",
        f"| whole file | {found['bytes_after'] / 1e9:.2f} GB | |",
        f"| largest tensor | {found['largest_tensor_bytes'] / 1e6:.0f} MB | |",
        f"| peak memory of the process | {found['peak_bytes'] / 1e6:.0f} MB "
        f"| at most {allowed / 1e6:.0f} MB |",
        f"| copying | {copying:.1f} s | |",
        f"| converting | {converting:.1f} s | |",
        f"| converting / copying | {ratio(found):.2f} | at most 3 |",
    ]


def ratio(found: dict[str, Any]) -> float:
    turns = zip(found["convert_seconds"], found["copy_seconds"], strict=True)
    return statistics.median(converting / copying for converting, copying in turns)


@click.command()
@click.option("--gigabytes", default=8.0, help="Size of the checkpoint, in decimal GB.")
@click.option("--repeats", default=3, help="Turns of copying and converting.")
@click.option("--work", help="Folder for the files.  [a temporary one]")
def main(gigabytes: float, repeats: int, work: str | None) -> None:
    """Measure converting against copying."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        found = measured(Path(folder), int(gigabytes * 1e9), repeats)
    lines = lines_of(found)
    write_report("conversion", "Converting to INT8", {"machine": machine(), **found}, lines)
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
