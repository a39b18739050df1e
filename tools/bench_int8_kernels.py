"""The integer kernels beside 16-bit products, on one NVIDIA GPU.

    python -m tools.bench_int8_kernels [--rows 8192]

Writes docs/benchmarks/int8_kernels.json and int8_kernels.md. Two protocols, hot and cool, are those
of tools/torch_products.py, through which cuBLAS is measured in a process of its own where PyTorch
sees the GPU.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from typing import Any

from src.backends import Weight
from src.backends import cuda_int8_kernels as kernels
from src.backends.cuda_int8 import CudaInt8, status, usable
from src.backends.cuda_int8_source import MMA, Variant
from src.backends.fusing import InputGrid, Modulation
from src.models.mmdit import NORM_EPS, modulate
from src.quant.grid import absmax_scale, nearest_codes

import click
import mlx.core as mx
import mlx.nn as nn

from tools.bench_common import machine, write_report
from tools.int8_models import packed_here
from tools.torch_products import PRIMER_BYTES, PROTOCOLS, SETS, Call, Clock

SHAPES = ((1536, 6144), (6144, 1536), (1536, 1536), (1536, 4608))  # (N, K)
HIDDEN, WIDE = 1536, 6144  # of the MLP
TORCH = "cuBLAS fp16 (PyTorch)"
FP16, INT8, ALONE = "MLX fp16", "int8", "quantizer alone"


def mlx_clock() -> Clock:
    large, before = mx.zeros((PRIMER_BYTES // 4,)), []
    mx.eval(large)

    def queue(batch: list[mx.array]) -> None:
        mx.async_eval(batch)
        mx.eval(before)  # one batch ahead and no further: outputs take memory when they are queued
        before[:] = batch[-1:]

    return Clock(queue, mx.synchronize, lambda i: large + 1)


# --- cuBLAS, in a process of its own


def started_torch() -> tuple[subprocess.Popen | None, str]:
    """The worker and what it runs on, or none and why."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "tools.torch_products"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    found = worker.stdout.readline()
    if found:
        return worker, found.strip()
    return None, (worker.communicate()[1].strip().splitlines() or ["ended"])[-1]


def products_of_torch(worker: subprocess.Popen | None, *shape: int) -> dict[str, dict[str, float]]:
    """One row of a table, or none where there is no worker or it has ended."""
    if worker is None or worker.poll() is not None:
        return {}
    worker.stdin.write(" ".join(map(str, shape)) + "\n")
    answer = worker.stdout.readline()
    return {TORCH: json.loads(answer)} if answer else {}


# --- what is compared


def operand_of(weight: mx.array, packed: bool = False) -> dict[str, Any]:
    """W4, at int8 in tiles or packed."""
    scales = absmax_scale(weight, 4)
    words = packed_here(nearest_codes(weight, scales, 4), 4)
    backend = CudaInt8(keeps_packed=packed)
    operand = backend.prepare(Weight(words, scales, 4), mx.float16, 127)
    mx.eval(operand["columns"], words, scales)
    return operand


def static_grid() -> InputGrid:
    grid = InputGrid(mx.array([4 / 127]), mx.array([127.0]))
    mx.eval(grid.scales, grid.limits)
    return grid


def layers(rows: int, outputs: int, columns: int) -> dict[str, Call]:
    """Ways of one product with its bias."""
    x = [mx.random.normal((rows, columns)).astype(mx.float16) for _ in range(SETS)]
    w = [(mx.random.normal((outputs, columns)) * 0.02).astype(mx.float16) for _ in range(SETS)]
    bias, backend, grid = mx.zeros((outputs,), dtype=mx.float16), CudaInt8(), static_grid()
    token = InputGrid(grid.scales, grid.limits, per_token=True)
    operands, packed = [operand_of(v) for v in w], [operand_of(v, packed=True) for v in w]
    codes = [backend.quantize(v, grid) for v in x]
    four = [mx.quantize(v, group_size=64, bits=4) for v in w]
    mx.eval(x, w, bias, four, [(c.tiles, c.scales) for c in codes])

    def product(i: int, operand: dict[str, Any]) -> mx.array:
        return backend.product(codes[i % SETS], operand, mx.float16)

    calls = {
        FP16: lambda i: mx.addmm(bias, x[i % SETS], w[i % SETS].T),
        "MLX quantized_matmul W4": lambda i: mx.quantized_matmul(
            x[i % SETS], *four[i % SETS], transpose=True, group_size=64, bits=4
        ),
        INT8: lambda i: product(i, operands[i % SETS]),
        "int8, weight kept packed": lambda i: product(i, packed[i % SETS]),
        "int8 with static quantizer": lambda i: backend.linear(
            x[i % SETS], grid, operands[i % SETS]
        ),
        "int8 with quantizer per token": lambda i: backend.linear(
            x[i % SETS], token, operands[i % SETS]
        ),
        ALONE: lambda i: backend.quantize(x[i % SETS], grid).tiles,
    }
    if usable() is not MMA:
        calls["int8 by mma.sync"] = lambda i: product(i, {**operands[i % SETS], "kernel": MMA.name})
    return calls


def mlps(rows: int) -> dict[str, Call]:
    """Ways of FC1, GELU and FC2."""
    x = [mx.random.normal((rows, HIDDEN)).astype(mx.float16) for _ in range(SETS)]
    w1 = [(mx.random.normal((WIDE, HIDDEN)) * 0.02).astype(mx.float16) for _ in range(SETS)]
    w2 = [(mx.random.normal((HIDDEN, WIDE)) * 0.02).astype(mx.float16) for _ in range(SETS)]
    b1, b2 = (mx.zeros((n,), dtype=mx.float16) for n in (WIDE, HIDDEN))
    backend, grid = CudaInt8(), static_grid()
    token = InputGrid(grid.scales, grid.limits, per_token=True)
    first, second = [operand_of(v) for v in w1], [operand_of(v) for v in w2]
    following = kernels.following(grid, WIDE)
    mx.eval(x, w1, w2, b1, b2, following.table)

    @mx.compile
    def floats(x: mx.array, w1: mx.array, w2: mx.array) -> mx.array:
        return mx.addmm(b2, nn.gelu_approx(mx.addmm(b1, x, w1.T)), w2.T)

    def integers(i: int, input_grid: InputGrid) -> mx.array:
        codes = backend.quantize(x[i % SETS], input_grid)
        hidden = backend.product_gelu(codes, first[i % SETS], following)
        return backend.product(hidden, second[i % SETS], mx.float16)

    def unfused(i: int) -> mx.array:
        hidden = nn.gelu_approx(backend.linear(x[i % SETS], grid, first[i % SETS]))
        return backend.linear(hidden, grid, second[i % SETS])

    return {
        FP16: lambda i: floats(x[i % SETS], w1[i % SETS], w2[i % SETS]),
        INT8: lambda i: integers(i, grid),
        "int8, input per token": lambda i: integers(i, token),
        "int8, GELU by MLX": unfused,
    }


def projections(rows: int) -> dict[str, Call]:
    """Ways of q, k and v of one input."""
    x = [mx.random.normal((rows, HIDDEN)).astype(mx.float16) for _ in range(SETS)]
    w = [(mx.random.normal((HIDDEN, HIDDEN)) * 0.02).astype(mx.float16) for _ in range(SETS)]
    bias, backend, grid = mx.zeros((HIDDEN,), dtype=mx.float16), CudaInt8(), static_grid()
    operands = [operand_of(v) for v in w]
    merged = backend.merged([operand_of(v) for v in w])
    mx.eval(x, w, bias)

    def integers(i: int) -> mx.array:
        return backend.product(backend.quantize(x[i % SETS], grid), merged, mx.float16)

    def apart(i: int) -> list[mx.array]:
        codes = backend.quantize(x[i % SETS], grid)
        return [backend.product(codes, operand, mx.float16) for operand in operands]

    return {
        FP16: lambda i: [mx.addmm(bias, x[i % SETS], v.T) for v in w],
        INT8: integers,
        "int8, three products": apart,
        "int8, each quantized": lambda i: [backend.linear(x[i % SETS], grid, o) for o in operands],
    }


def norms(rows: int) -> dict[str, Call]:
    """Ways from a stream's tokens to the codes of their modulated layer norm."""
    x = [mx.random.normal((2, rows // 2, HIDDEN)).astype(mx.float16) for _ in range(SETS)]
    parts = [(0.1 * mx.random.normal((2, 6 * HIDDEN))).astype(mx.float16) for _ in range(SETS)]
    backend, grid = CudaInt8(), static_grid()
    mx.eval(x, parts)
    plain = mx.compile(modulate)

    def vectors(i: int) -> list[mx.array]:
        return mx.split(parts[i % SETS], 6, axis=1)[:2]

    def fused(i: int) -> mx.array:
        shift, scale = vectors(i)
        return backend.quantize_modulated(
            x[i % SETS], Modulation(scale, shift, NORM_EPS), grid
        ).tiles

    return {
        FP16: lambda i: plain(x[i % SETS], *vectors(i)),
        "the same, then codes": lambda i: (
            backend.quantize(plain(x[i % SETS], *vectors(i)), grid).tiles
        ),
        INT8: fused,
    }


def gated_sums(rows: int) -> dict[str, Call]:
    """Ways of a product of codes, its gate and the residual; in fp16 one of floats, and in one way
    the codes are made of floats too."""
    shape = (2, rows // 2, HIDDEN)
    x, residual = (
        [mx.random.normal(shape).astype(mx.float16) for _ in range(SETS)] for _ in range(2)
    )
    gates = [mx.random.normal((2, HIDDEN)).astype(mx.float16) for _ in range(SETS)]
    w = [(mx.random.normal((HIDDEN, HIDDEN)) * 0.02).astype(mx.float16) for _ in range(SETS)]
    bias, backend, grid = mx.zeros((HIDDEN,), dtype=mx.float16), CudaInt8(), static_grid()
    operands, codes = [operand_of(v) for v in w], [backend.quantize(v, grid) for v in x]
    mx.eval(residual, gates, w, bias, [(c.tiles, c.scales) for c in codes])

    @mx.compile
    def added(x: mx.array, y: mx.array, gate: mx.array) -> mx.array:
        return x + y.reshape(x.shape) * gate[:, None]

    def apart(i: int, y: mx.array) -> mx.array:
        return added(residual[i % SETS], y, gates[i % SETS])

    def joined(i: int, found: kernels.Codes) -> mx.array:
        return backend.product_added(found, operands[i % SETS], residual[i % SETS], gates[i % SETS])

    return {
        FP16: lambda i: apart(i, mx.addmm(bias, x[i % SETS], w[i % SETS].T)),
        "int8, added afterwards": lambda i: apart(
            i, backend.product(codes[i % SETS], operands[i % SETS], mx.float16)
        ),
        INT8: lambda i: joined(i, codes[i % SETS]),
        "int8, with its quantization": lambda i: joined(i, backend.quantize(x[i % SETS], grid)),
    }


# --- the report


def table(found: dict[str, dict[str, float]], operations: float) -> list[str]:
    """Milliseconds, 10^12 operations a second, and how often faster than the first."""
    base = next(iter(found))
    lines = [
        f"| | hot ms | cool ms | hot TOPS | hot, times {base} | cool, times {base} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, seconds in found.items():
        hot, cool = seconds["hot"], seconds["cool"]
        cells = [name, f"{1e3 * hot:.3f}", f"{1e3 * cool:.3f}", "", "", ""]
        if name != ALONE:  # which multiplies nothing
            cells[3] = f"{operations / hot / 1e12:.0f}" if operations else ""
            cells[4:] = (f"{found[base][how] / seconds[how]:.2f}" for how in ("hot", "cool"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def run(rows: int, variant: Variant) -> tuple[dict[str, Any], list[str]]:
    worker, torch = started_torch()
    data: dict[str, Any] = {"machine": machine(), "kernel": status(), "torch": torch, "rows": rows}
    lines = [f"{rows} rows; {variant.name}. {PROTOCOLS}"]
    if worker is None:
        lines += ["", f"No PyTorch with CUDA here ({torch}): the base is MLX's fp16 product."]
    clock, jobs = mlx_clock(), {}
    for outputs, columns in SHAPES:
        shape = (rows, outputs, columns)
        jobs[f"N {outputs}, K {columns}"] = (shape, lambda shape=shape: layers(*shape))
    jobs["Whole MLP"] = ((2 * rows, HIDDEN, WIDE), lambda: mlps(rows))
    jobs["q, k and v"] = ((3 * rows, HIDDEN, HIDDEN), lambda: projections(rows))
    jobs["Output projection, gate and residual"] = (
        (rows, HIDDEN, HIDDEN),
        lambda: gated_sums(rows),
    )
    jobs["Modulated layer norm to codes (no product)"] = ((0,), lambda: norms(rows))
    for title, (shape, ways) in jobs.items():
        found = products_of_torch(worker, *shape) if title.startswith("N ") else {}
        found |= {name: clock.seconds(call) for name, call in ways().items()}
        data[title] = found
        section = ["", f"## {title}", "", *table(found, 2.0 * math.prod(shape))]
        click.echo("\n".join(section))
        lines += section
    if worker is not None:
        worker.communicate()  # closes its input, which ends it
    return data, lines


@click.command()
@click.option("--rows", default=8192, help="Tokens: 8192 are 1024 pixels, with guidance.")
def main(rows: int) -> None:
    """Time the integer kernels and what they replace."""
    variant = usable()
    if variant is None:
        raise click.ClickException(f"no kernel to measure: {status()}")
    begun = time.perf_counter()
    data, lines = run(rows, variant)
    write_report("int8_kernels", "Integer kernels", data, lines)
    click.echo(f"\n{lines[0]}\n{status()}, {data['torch']}, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
