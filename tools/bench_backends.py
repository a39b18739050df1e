"""What a quantized step costs beside the float one, and each backend at SD3's shapes.

    python -m tools.bench_backends [--model nano] [--with-shapes] [--name backends]

Writes docs/benchmarks/NAME.json and NAME.md. Codes are the nearest ones, since rounding
does not change the time. Everything is measured in turns, so that a busy machine is busy for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from src.backends import BACKENDS, Device, named
from src.models.load import default_dtype, load_pipeline
from src.models.paths import block_linears
from src.quant.artifacts import LayerConfig, QuantConfig, RoundedLayer
from src.quant.grid import absmax_scale, nearest_codes
from src.quant.inject import inject
from src.quant.linear import QuantizedLinear, Runtime
from src.sampling import sd3_sigmas

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tools.bench_common import machine, write_report

PROMPT = "a large red star in the center on a night background"
SHAPES = {"q, k, v, o": (1536, 1536), "fc1": (6144, 1536), "fc2": (1536, 6144)}  # (N, K)
TEXT_TOKENS = 2 * 154  # with guidance
GRID = LayerConfig([8], [0.05])
VARIANTS = {
    "W4A8": ("static", None),
    "W4A8 per token": ("token", None),
    "W4A8, reference": ("static", "reference"),
    "W4A8, quantized_matmul": ("static", "quantized_matmul"),
}


def in_turns(calls: dict[str, Callable[[], mx.array]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each call, median and least, and the median ratio to the first of its round.

    Left out is what this device has no kernel for.
    """
    calls = {name: call for name, call in calls.items() if runs(name, call)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            mx.eval(call())
            seconds[name].append(time.perf_counter() - start)
    first = np.array(next(iter(seconds.values())))
    return {
        name: {
            "median": float(np.median(values)),
            "least": min(values),
            "ratio": float(np.median(np.array(values) / first)),
        }
        for name, values in seconds.items()
    }


def runs(name: str, call: Callable[[], mx.array]) -> bool:
    try:
        mx.eval(call())
    except RuntimeError as error:
        click.echo(f"{name} does not run here: {error}", err=True)
        return False
    return True


def quantized_pipeline(model: str, a_scale: str, kernel: str | None):
    """The model with W4A8 in all block linears."""
    pipeline = load_pipeline(model)
    layers = {}
    for path, linear in block_linears(pipeline.transformer).items():
        scale = absmax_scale(linear.weight, 4)
        codes = np.array(nearest_codes(linear.weight, scale, 4))
        layers[path] = RoundedLayer(codes, np.array(scale), np.ones(1, np.float32))
    sigmas = [float(s) for s in sd3_sigmas(pipeline.defaults.num_steps)[:-1]]
    grid = LayerConfig([8] * len(sigmas), [0.05] * len(sigmas))
    config = QuantConfig({}, list(range(len(sigmas))), sigmas, dict.fromkeys(layers, grid))
    backend = None if kernel is None else named(kernel)
    inject(pipeline.transformer, layers, config=config, a_scale=a_scale, backend=backend)
    return pipeline


def steps(model: str, rounds: int) -> dict[str, dict[str, float]]:
    """One guided step of the model, one picture."""
    pipelines = {"float": load_pipeline(model)}
    pipelines |= {name: quantized_pipeline(model, *how) for name, how in VARIANTS.items()}
    calls = {}
    for name, pipeline in pipelines.items():
        defaults = pipeline.defaults
        velocity = pipeline.velocity(pipeline.condition([PROMPT], 4.0), defaults.cfg_weight)
        shape = (1, *pipeline.latent_shape(defaults.height, defaults.width))
        latent = mx.random.normal(shape, key=mx.random.key(0))
        calls[name] = lambda v=velocity, x=latent: v(x, mx.array(0.5))
    return in_turns(calls, rounds)


def shapes(rounds: int, image_tokens: int) -> dict[str, dict[str, dict[str, float]]]:
    """Single layers of SD3-medium, by role and stream."""
    table = {}
    for role, (rows, columns) in SHAPES.items():
        linear = nn.Linear(columns, rows)
        linear.set_dtype(default_dtype())
        layers = {"float": linear}
        for name, backend in BACKENDS.items():
            runtime = Runtime(backend=backend)
            layers[name] = QuantizedLinear.from_linear(linear, grid=GRID, runtime=runtime)
        for stream, tokens in (("image", image_tokens), ("text", TEXT_TOKENS)):
            x = mx.random.normal((1, tokens, columns), key=mx.random.key(0))
            x = x.astype(linear.weight.dtype)
            calls = {name: caller(layer, x) for name, layer in layers.items()}
            table[f"{role} {stream}, {tokens} x {rows} x {columns}"] = in_turns(calls, rounds)
    return table


def caller(layer: nn.Module, x: mx.array) -> Callable[[], mx.array]:
    """As the pipeline runs it: compiled but on the CPU."""
    on_cpu = Device.here().kind == "cpu"
    call = layer if on_cpu else mx.compile(layer, inputs=layer.state)
    return lambda: call(x)


def table_of(rows: dict[str, dict[str, float]]) -> list[str]:
    lines = ["| | median ms | least ms | times the float |", "|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {1e3 * row['median']:.2f} | {1e3 * row['least']:.2f} "
            f"| {row['ratio']:.2f} |"
        )
    return lines


@click.command()
@click.option("--model", default="nano", help="Name or folder.")
@click.option("--rounds", default=20, help="How often everything is measured.")
@click.option("--with-shapes", is_flag=True, help="Also SD3-medium's layers, one by one.")
@click.option("--image-tokens", default=8192, help="Of both guidance rows; 8192 are 1024 pixels.")
@click.option("--name", default="backends", help="Of the report.")
def main(model: str, rounds: int, with_shapes: bool, image_tokens: int, name: str) -> None:
    """Time a quantized step and every backend."""
    data = {"machine": machine(), "step": steps(model, rounds)}
    lines = [f"One guided step of {model}, one picture, {default_dtype()}:", ""]
    lines += table_of(data["step"])
    if with_shapes:
        data["layers"] = shapes(max(3, rounds // 4), image_tokens)
        for layer, rows in data["layers"].items():
            lines += ["", f"{layer}:", "", *table_of(rows)]
    write_report(name, "Backends", data, lines)
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
