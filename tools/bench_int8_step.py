"""A whole guided step of an SD3-medium of random weights: 16 bits, MLX's 4 bits, W8A8 and W4A8.

    python -m tools.bench_int8_step [--model sd3-medium] [--pixels 512 --pixels 1024]

Writes docs/benchmarks/int8_step.json and int8_step.md; with --dry-run nothing. On an NVIDIA GPU all
is measured twice, in processes of their own: with CUDA graphs, as MLX does by itself, and without.
"""

from __future__ import annotations

import gc
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.backends import Device, cuda_int8
from src.benchmarking.kernels import available
from src.benchmarking.timing import in_turns, ratios, refusal_of, seconds_of, spread
from src.cuda import GRAPHS
from src.inference.kernels import TEXT_TOKENS
from src.models.mmdit import attend
from src.models.paths import block_linears
from src.models.pipeline import Pipeline

import click
import mlx.core as mx

from tools.bench_common import machine, write_report
from tools.int8_models import (
    BASE,
    MLX4,
    TIMED,
    Model,
    held_bytes,
    inputs_of,
    kernels_of,
    model_of,
    peak_of,
    step_of,
)

MAKING = 3  # seconds that one more row may take
# Of MLX's primitives those that only look at an array in another way.
VIEWS = set(
    "Reshape Transpose ExpandDims Squeeze Broadcast Unflatten Split Slice Contiguous".split()
)
VIEWS |= {"CustomTransforms"}
PARTS = {"Concatenate": 2}  # copies: one of either stream
GOALS = {512: (1.35, 2.5), 1024: (1.2, 2.0)}  # times 16 bits, and times MLX's own 4 bits


@dataclass(frozen=True)
class Row:
    name: str
    make: Callable[[], Pipeline]


def rows_for(model: Model) -> Iterator[Row]:
    """All that is compared, the most wanted first."""
    kernels = [name for name in available(()).names if name != "reference"]
    kernels.sort(key=lambda name: not name.startswith("cuda"))
    yield Row(BASE, lambda: model.exact)
    yield Row(MLX4, model.in_mlx4)
    for bits in (4, 8):
        yield Row(f"W{bits}A8, as chosen", lambda bits=bits: model.over(bits, None))
        for kernel in kernels:
            yield Row(
                f"W{bits}A8, {kernel}", lambda bits=bits, kernel=kernel: model.over(bits, kernel)
            )
    yield Row("INT8 layers, scales per token", model.in_int8)


def attention_of(model: Model, tokens: int) -> Callable[[], list[mx.array]]:
    """The joint attentions of all blocks, nothing else."""
    config = model.exact.transformer.config
    shape = (2, config.heads, tokens + TEXT_TOKENS, config.head_dim)
    q, k, v = (mx.random.normal(shape).astype(model.exact.dtype) for _ in range(3))
    mx.eval(q, k, v)
    return lambda: [attend(q, k, v) for _ in range(config.depth)]


def linears_of(model: Model, tokens: int) -> Callable[[], list[mx.array]]:
    """The products of all block linears in 16 bits, nothing else."""
    inputs: dict[tuple[bool, int], mx.array] = {}
    calls = []
    for path, linear in block_linears(model.exact.transformer).items():
        text, columns = "text_transformer_block" in path, linear.weight.shape[1]
        if (text, columns) not in inputs:
            shape = (2, TEXT_TOKENS if text else tokens, columns)
            inputs[text, columns] = mx.random.normal(shape).astype(model.exact.dtype)
        calls.append((linear, inputs[text, columns]))
    mx.eval(list(inputs.values()))

    def run() -> list[mx.array]:
        outputs = []
        for linear, x in calls:
            outputs.append(linear(x))
            mx.async_eval(outputs[-1])
            outputs = outputs[-8:]  # all of them at once would not fit everywhere
        return outputs

    return run


def measured(model: Model, pixels: int, rounds: int, seconds: float) -> dict[str, Any]:
    """All rows at one size, in turns; `seconds` are without the compiling of kernels."""
    end = time.monotonic() + seconds
    model.draw_at(pixels)
    inputs = inputs_of(model, pixels)
    calls: dict[str, Callable[[], mx.array]] = {}
    found: dict[str, Any] = {"tokens": inputs.tokens, "rows": {}, "left_out": {}}
    turn = 0.0  # seconds of all rows so far, one after the other
    for row in rows_for(model):
        late = time.monotonic() + MAKING + (rounds + 1) * turn > end
        if late and row.name != BASE:  # which all are compared with
            found["left_out"][row.name] = "no time was left"
            continue
        pipeline = row.make()
        held, call = held_bytes(pipeline.transformer), step_of(pipeline, inputs)
        begun = time.monotonic()
        reason = refusal_of(lambda call=call: mx.eval(call()))
        end += time.monotonic() - begun
        if reason is not None:
            found["left_out"][row.name] = reason
            continue
        begun = time.monotonic()
        peak, calls[row.name] = peak_of(call), call
        turn += time.monotonic() - begun
        found["rows"][row.name] = {
            "held": held,
            "peak": peak,
            "kernels": kernels_of(pipeline.transformer),
        }
    tokens = inputs.tokens
    parts = {"attention": attention_of(model, tokens), "linears": linears_of(model, tokens)}
    timed = {name: seconds_of(call) for name, call in (calls | parts).items()}
    seconds = in_turns(timed, rounds, warm_up=1)
    for name, row in found["rows"].items():
        row |= spread(seconds[name])
        row["faster"] = 1 / ratios(seconds[name], seconds[BASE])["median"]
    found |= {name: spread(seconds[name])["median"] for name in parts}
    return found


def launches(pipeline: Pipeline, tokens: int) -> dict[str, int]:
    """Kernels that the first block starts, compiled, by MLX's name of what they are; the scales of
    the step, which all blocks share, are there already."""
    transformer, dtype = pipeline.transformer, pipeline.dtype
    block, hidden = transformer.multimodal_transformer_blocks[0], transformer.config.hidden
    streams = block.image_transformer_block, block.text_transformer_block
    shapes = [(2, tokens, hidden), (2, TEXT_TOKENS, hidden)]
    shapes += [(2, s.adaLN_modulation.layers[1].weight.shape[0]) for s in streams]
    inputs = [mx.zeros(shape, dtype) for shape in shapes]
    mx.eval(inputs)
    level = transformer.level
    with nullcontext() if level is None else level.at(mx.array(TIMED)):
        known = [] if level is None else [level.grid(0, ndim) for ndim in (1, 3)]
        mx.eval([] if level is None else [level.place, level.part, known])
        outputs = mx.compile(block.modulated)(*inputs)
    graph = io.StringIO()
    mx.export_to_dot(graph, *outputs)
    found = Counter(re.findall(r'label ?="(\w+)", shape=rectangle', graph.getvalue()))
    return {n: count * PARTS.get(n, 1) for n, count in found.items() if n not in VIEWS}


def bytes_a_token(hidden: int, ratio: int) -> dict[str, int]:
    """Read and written around the linears of one stream of a block, without weights and attention,
    counted by hand: 2 bytes a number, 1 a code; what is fused stays in the chip."""
    norm, modulation, residual = 2 + 2, 2 + 2, 2 + 2 + 2
    gelu, wide = 4 * ratio, 2 * ratio
    floats = 2 * (norm + modulation + residual) + 4 * (2 + 2) + (2 + wide) + gelu + (wide + 2)
    quantized = 5 * (2 + 1) + (wide + ratio)  # floats to codes: q, k, v, o and fc1, then fc2
    products = 4 * (1 + 2) + (1 + wide) + (ratio + 2)
    alone = 2 * (norm + modulation + residual) + quantized + products + gelu
    entered = 2 * (2 + 1) + (2 + 1)  # the two norms with their codes, and o's codes
    ended = 3 * (1 + 2) + (1 + 2 + 2) + (1 + ratio) + (ratio + 2 + 2)
    per_channel = {BASE: floats, "layer by layer": alone, "joined": entered + ended}
    return {name: hidden * count for name, count in per_channel.items()}


def blocks_of(model: Model, tokens: int) -> dict[str, Any]:
    """Kernels and bytes of a block, before its layers are joined and after."""
    config, kernel = model.exact.transformer.config, "cuda_int8"
    ways = {BASE: lambda: model.exact}
    if cuda_int8.usable():
        ways["layer by layer"] = lambda: model.over(4, kernel, joins=False)
        ways["joined"] = lambda: model.over(4, kernel)
    counted = bytes_a_token(config.hidden, config.mlp_ratio)
    return {
        name: {"kernels": launches(make(), tokens), "bytes_a_token": counted[name]}
        for name, make in ways.items()
    }


def worker(name: str, pixels: tuple[int, ...], rounds: int, seconds: float) -> dict[str, Any]:
    model, sizes = model_of(name), {}
    cuda_int8.usable()  # its self-test is no part of measuring
    for size in pixels:
        sizes[str(size)] = measured(model, size, rounds, seconds / len(pixels))
        gc.collect()
        mx.clear_cache()
    described = {"dtype": str(model.exact.dtype), "kernel": cuda_int8.status(), "sizes": sizes}
    tokens = next(iter(sizes.values()))["tokens"]
    return described | {"blocks": blocks_of(model, tokens)}


def ways() -> dict[str, dict[str, str]]:
    """What is measured in a process of its own, and its environment."""
    if Device.here().kind != "cuda":
        return {"": {}}
    return {"CUDA graphs": {GRAPHS: "1"}, "no CUDA graphs": {GRAPHS: "0"}}


def lines_of(data: dict[str, Any]) -> list[str]:
    lines = [
        f"One guided step of {data['model']} (a batch of 2, {TEXT_TOKENS} text tokens, random",
        "weights), as the pipeline runs it. Held are the transformer's arrays, peak what a step",
        "takes on top of them; times are medians of turns, `times` the median ratio of the turns.",
    ]
    for way, found in data["ways"].items():
        for pixels, size in found["sizes"].items():
            title = ", ".join(filter(None, [f"{pixels} pixels", found["dtype"], way]))
            lines += ["", f"## {title}", "", *table_of(size), "", *bound_of(int(pixels), size)]
    blocks = next(iter(data["ways"].values()))["blocks"]
    return [*lines, "", "## What a block takes", "", *blocks_table(blocks)]


def table_of(size: dict[str, Any]) -> list[str]:
    lines = ["| | ms | times 16 bits | times MLX's 4 bits | held GB | peak GB | kernels |"]
    lines.append("|---|---:|---:|---:|---:|---:|---|")
    for name, row in size["rows"].items():
        four = size["rows"].get(MLX4)
        against = f"{four['median'] / row['median']:.2f}" if four else ""
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in sorted(row["kernels"].items()))
        lines.append(
            f"| {name} | {1e3 * row['median']:.2f} | {row['faster']:.2f} | {against} "
            f"| {row['held'] / 1e9:.2f} | {row['peak'] / 1e9:.2f} | {kernels} |"
        )
    return [*lines, *(f"\n{name} is left out: {why}." for name, why in size["left_out"].items())]


def blocks_table(blocks: dict[str, Any]) -> list[str]:
    lines = ["| a block | kernels | of these | bytes a token and stream beside the weights |"]
    lines.append("|---|---:|---|---:|")
    for name, found in blocks.items():
        kinds: Counter[str] = Counter()
        for kind, count in found["kernels"].items():
            kinds[re.sub("^Compiled.*", "compiled", kind)] += count
        words = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        lines.append(f"| {name} | {sum(kinds.values())} | {words} | {found['bytes_a_token']} |")
    return lines


def bound_of(pixels: int, size: dict[str, Any]) -> list[str]:
    """What integers could gain at most, and the goals."""
    whole, attention, linears = size["rows"][BASE]["median"], size["attention"], size["linears"]
    rest = max(whole - linears, 1e-9)
    lines = [
        f"Of the 16-bit step the attentions alone take {1e3 * attention:.2f} ms, the block linears "
        f"alone {1e3 * linears:.2f} ms. With linears twice as fast a step would be "
        f"{whole / (rest + linears / 2):.2f} times as fast, with linears that take no time "
        f"{whole / rest:.2f} times, with nothing but attention {whole / attention:.2f} times."
    ]
    codes = {n: r for n, r in size["rows"].items() if n.startswith(("W4A8", "W8A8"))}
    if pixels in GOALS and codes and MLX4 in size["rows"]:
        best = min(codes, key=lambda name: codes[name]["median"])
        goals = GOALS[pixels]
        four = size["rows"][MLX4]["median"] / codes[best]["median"]
        lines += [
            "",
            f"The fastest on codes, {best}: {codes[best]['faster']:.2f} times 16 bits (goal: "
            f"{goals[0]}), {four:.2f} times MLX's own 4 bits (goal: {goals[1]}).",
        ]
    return lines


@click.command()
@click.option("--model", default="sd3-medium", help="Shape of the transformer.")
@click.option("--pixels", multiple=True, type=int, help="Side of the picture.  [512 and 1024]")
@click.option("--rounds", default=7, help="How often every step is measured.")
@click.option("--seconds", default=80.0, help="Of measuring in each process; then rows are left.")
@click.option("--name", default="int8_step", help="Of the report.")
@click.option("--note", default="", help="What else the machine did meanwhile, for the report.")
@click.option("--dry-run", is_flag=True, help="Only print.")
@click.option("--worker", "result", help="Measure in this process and write to that file.")
def main(
    model: str,
    pixels: tuple[int, ...],
    rounds: int,
    seconds: float,
    name: str,
    note: str,
    dry_run: bool,
    result: str | None,
) -> None:
    """Time a whole step on codes beside 16 bits."""
    pixels = pixels or (512, 1024)
    if result is not None:
        Path(result).write_text(json.dumps(worker(model, pixels, rounds, seconds)))
        return
    begun = time.perf_counter()
    data = {"machine": machine(), "note": note, "model": model, "ways": {}}
    arguments = [f"--model={model}", f"--rounds={rounds}", f"--seconds={seconds}"]
    arguments += [f"--pixels={size}" for size in pixels]
    for way, environment in ways().items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result.json"
            subprocess.run(
                [sys.executable, "-m", "tools.bench_int8_step", *arguments, f"--worker={file}"],
                env={**os.environ, **environment},
                check=True,
            )
            data["ways"][way] = json.loads(file.read_text())
    lines = lines_of(data)
    if not dry_run:
        write_report(name, "Whole steps on codes", data, lines)
    click.echo("\n".join(lines))
    click.echo(f"\n{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
