"""Peak memory and time of a step against the number of blocks in memory.

    python -m tools.bench_streaming [--blocks 24] [--keep 1,2,4,8,16] [--work FOLDER]

Writes docs/benchmarks/streaming.json and streaming.md, or other names by --report. A transformer of
SD3-medium's shapes with random weights is written to a float16 file, and converted to INT8. Each is
run as a whole and with few of its blocks in memory, from the same inputs: outputs must be equal,
bit for bit.
The files were written a moment before, so the system may have them in memory.
"""

from __future__ import annotations

import ctypes
import gc
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from src.convert_to_int8 import convert_to_int8
from src.inference.int8 import WHILE_LOADING, share_work
from src.inference.kernels import rows_of
from src.inference.streaming import bytes_of, streamed
from src.models.configs import MMDiTConfig, config_named
from src.models.load import default_dtype
from src.models.mmdit import JointBlock, MMDiT
from src.models.paths import BLOCKS
from src.models.pipeline import compiling_is_faster
from src.quant.replace import QuantizationBlock, prepare_int8
from src.store import (
    TensorInfo,
    TensorWriter,
    human_bytes,
    load_tensors,
    require_space,
    stream_tensors,
)

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from tools.bench_backends import in_turns
from tools.bench_common import machine, write_report
from tools.bench_int8 import DEFAULTS, pipeline_of, step_of
from tools.synthetic import fill_part, outside_of_blocks

PLAIN = "all"
KINDS = {
    "16-bit": QuantizationBlock(),
    "INT8": replace(WHILE_LOADING, checkpoint_is_quantized=True),
}
ALLOWED = 1.10  # times N + 2 blocks
PEAK_FILE, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def write_checkpoint(path: Path, config: MMDiTConfig) -> None:
    """Random float16 weights, of which no more than a block is ever in memory."""
    shapes = {name: t.shape for name, t in tree_flatten(MMDiT(config).parameters())}
    infos = {n: TensorInfo("float16", s, 2 * int(np.prod(s))) for n, s in shapes.items()}
    require_space(path.parent, 2 * sum(i.nbytes for i in infos.values()), "two checkpoints")
    rest = MMDiT(replace(config, depth=1, dual_attention_blocks=0))
    with stream_tensors(path, infos) as writer:
        for index in range(config.depth):
            block = JointBlock(config, index)
            fill_part(block, mx.float16, index)
            write(writer, f"{BLOCKS}.{index}.", block)
        for part in outside_of_blocks(rest):
            fill_part(part, mx.float16, config.depth)
        rest[BLOCKS] = []
        write(writer, "", rest)


def write(writer: TensorWriter, prefix: str, module: nn.Module) -> None:
    for name, tensor in tree_flatten(module.parameters()):
        writer.write(f"{prefix}{name}", np.array(tensor))


def opened(path: Path, config: MMDiTConfig, block: QuantizationBlock, pixels: int) -> MMDiT:
    """The transformer in the file, as pictures of that size are drawn."""
    model = MMDiT(config)
    prepare_int8(model, block, partial(load_tensors, path), dtype=default_dtype())
    rows = rows_of(config, replace(DEFAULTS, height=pixels, width=pixels))
    share_work(model, rows, default_dtype())
    return model


@contextmanager
def running(
    path: Path, kind: str, keep: int | None, options: dict[str, Any], in_order: bool = False
) -> Iterator[tuple[MMDiT, Callable[[], mx.array]]]:
    """The model, and a step with so many blocks in memory, all of them without a number; what is
    read once has been read, and what is compiled is so."""
    model = opened(path, options["config"], KINDS[kind], options["pixels"])
    context = nullcontext()
    if in_order:
        one_by_one(model)
    if keep is not None:
        context = streamed(pipeline_of(model), keep, partial(load_tensors, path))
    with context:
        step = step_of(model, options["pixels"], options["tokens"])
        mx.eval(step())
        yield model, step


def one_by_one(model: MMDiT) -> None:
    """From now on a block is finished before the next begins, as it is where blocks come and go: a
    whole step in flight holds more of its own arrays."""
    compiled: dict[int, Callable[..., Any]] = {}

    def run(index: int, block: Callable[..., Any], *inputs: mx.array) -> tuple[Any, Any]:
        if index not in compiled:
            compiled[index] = mx.compile(block) if compiling_is_faster() else block
        outputs = compiled[index](*inputs)
        mx.eval([output for output in outputs if output is not None])
        return outputs

    model.run_blocks_with(run)


def measured(
    path: Path, kind: str, keep: int | None, options: dict[str, Any], in_order: bool = False
) -> tuple[dict[str, Any], mx.array]:
    """The peak of a step, and its output; `in_order`: `one_by_one`."""
    with running(path, kind, keep, options, in_order) as (model, step):
        sizes = [bytes_of(block) for block in model[BLOCKS]]
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        reset_process_peak()
        for _ in range(2):
            output = step()
            mx.eval(output)
        row = {
            "keep": PLAIN if keep is None else keep,
            "peak": mx.get_peak_memory(),
            "process": process_peak(),
            "blocks": sum(sizes),
            "largest": max(sizes),
        }
    return row, output


def reset_process_peak() -> None:
    """What earlier models have left with the allocator goes back to the system first."""
    if RESET.exists():
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5")


def process_peak() -> int | None:
    """Bytes; None where the system does not tell."""
    text = PEAK_FILE.read_text() if PEAK_FILE.exists() else ""
    found = re.search(r"^VmHWM:\s*(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def table(path: Path, kind: str, keeps: list[int], options: dict[str, Any]) -> dict[str, Any]:
    """One kind's rows: memory of each alone, then the time of each in turns with the whole."""
    plain, wanted = measured(path, kind, None, options)
    outside = measured(path, kind, None, options, True)[0]["peak"] - plain["blocks"]
    rows = []
    for keep in keeps:
        row, output = measured(path, kind, keep, options)
        row["identical"] = bool(mx.array_equal(output, wanted))
        row["difference"] = float(mx.abs(output - wanted).max())
        row["held"] = (row["peak"] - outside) / row["largest"]
        row["met"] = row["held"] <= ALLOWED * (keep + 2)
        rows.append(row)
        click.echo(f"{kind}, {keep}: {row}", err=True)
    with running(path, kind, None, options) as (_, whole):
        for row in rows:
            with running(path, kind, row["keep"], options) as (_, step):
                times = in_turns({PLAIN: whole, "few": step}, options["rounds"])
            row["seconds"], row["times"] = times["few"]["median"], times["few"]["ratio"]
            row["whole_seconds"] = times[PLAIN]["median"]
    return {"plain": plain, "outside": outside, "rows": rows}


def lines_of(data: dict[str, Any]) -> list[str]:
    what = data["model"]
    lines = [
        f"{what['name']} with {what['depth']} of its blocks, random weights, computed in "
        f"{what['dtype']}; a guided step of",
        f"{what['pixels']} pixels and {what['tokens']} text tokens. Peaks are MLX's own; in memory",
        "are the peak's blocks: what is neither the rest of the model nor a step's own arrays",
        "(where one block is finished before the next begins), over the largest block. The goal is",
        "no more than N + 2 blocks and a tenth. Times are the",
        f"median of {what['rounds']} turns of both models.",
    ]
    for kind, found in data["kinds"].items():
        plain = found["plain"]
        lines += [
            "",
            f"{kind}, a block of {human_bytes(plain['largest'])}:",
            "",
            "| N | peak GB | process GB | blocks in memory | goal | seconds a step | with all, in "
            "turns | times | same bytes |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---|",
            f"| {PLAIN} {what['depth']} | {gigabytes(plain['peak'])} | "
            f"{gigabytes(plain['process'])} | {what['depth']} | | | | | |",
        ]
        for row in found["rows"]:
            lines.append(
                f"| {row['keep']} | {gigabytes(row['peak'])} | {gigabytes(row['process'])} | "
                f"{row['held']:.2f} | {ALLOWED * (row['keep'] + 2):.1f}"
                f"{'' if row['met'] else ', missed'} | {row['seconds']:.2f} | "
                f"{row['whole_seconds']:.2f} | {row['times']:.2f} | "
                f"{'yes' if row['identical'] else row['difference']} |"
            )
    return lines


def gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f}"


@click.command()
@click.option("--config", "name", default="sd3-medium", help="Whose shapes.")
@click.option("--blocks", type=int, help="How many of its blocks.  [all]")
@click.option("--keep", default="1,2,4,8,16", help="Numbers of blocks in memory, with commas.")
@click.option("--kinds", default=",".join(KINDS), help="With commas.")
@click.option("--pixels", default=512, help="Side of the picture.")
@click.option("--tokens", default=154, help="Of the text.")
@click.option("--rounds", default=3, help="Turns that are timed.")
@click.option("--report", default="streaming", help="Name of the files in docs/benchmarks.")
@click.option("--work", type=Path, help="Folder for the files.  [a temporary one]")
def main(
    name: str, blocks: int | None, keep: str, kinds: str, report: str, work: Path | None,
    **options: Any,
) -> None:  # fmt: skip
    """Measure block streaming."""
    config = config_named(name)
    config = replace(config, depth=blocks or config.depth)
    keeps = [n for n in map(int, keep.split(",")) if n < config.depth]
    told = {"name": name, "depth": config.depth, "dtype": str(default_dtype()), **options}
    told["dtype"] = told["dtype"].removeprefix("mlx.core.")
    data = {"machine": machine(), "model": told, "kinds": {}}
    options["config"] = config
    with tempfile.TemporaryDirectory(dir=work) as folder:
        files = {kind: Path(folder) / f"{kind}.safetensors" for kind in KINDS}
        write_checkpoint(files["16-bit"], config)
        convert_to_int8(files["16-bit"], files["INT8"], scheme="per-channel", quiet=True)
        for kind in kinds.split(","):
            data["kinds"][kind] = table(files[kind], kind, keeps, options)
    lines = lines_of(data)
    write_report(report, "Block streaming", data, lines)
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
