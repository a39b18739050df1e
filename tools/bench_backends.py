"""What a quantized step costs beside the float one, and each backend at SD3's shapes.

    python -m tools.bench_backends [--model nano] [--quant-config FILE] [--with-shapes]

Writes docs/benchmarks/NAME.json and NAME.md. Codes are the nearest ones, since rounding
does not change the time; with a quant config its grids, shifts and regions are measured beside
those of one scale. Everything is measured in turns, so that a busy machine is busy for all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from src.backends import BACKENDS, named
from src.benchmarking.kernels import available
from src.benchmarking.subjects import Codes, open_subject, with_kernel
from src.benchmarking.timing import in_turns as results_in_turns
from src.benchmarking.timing import ratios, refusal_of, seconds_of, spread
from src.models.load import default_dtype
from src.models.pipeline import Pipeline, compiling_is_faster
from src.quant.artifacts import LayerConfig
from src.quant.linear import QuantizedLinear, Runtime

import click
import mlx.core as mx
import mlx.nn as nn

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
CONFIG = "the quant config's grids"


def in_turns(calls: dict[str, Callable[[], mx.array]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each call, median and least, and the median ratio to the first of its round.

    Left out is what this device has no kernel for.
    """
    calls = {name: call for name, call in calls.items() if runs(name, call)}
    timed = {name: seconds_of(call) for name, call in calls.items()}
    seconds = results_in_turns(timed, rounds)
    first = next(iter(seconds.values()))
    found = {name: (spread(values), ratios(values, first)) for name, values in seconds.items()}
    return {
        name: {"median": own["median"], "least": own["least"], "ratio": ratio["median"]}
        for name, (own, ratio) in found.items()
    }


def runs(name: str, call: Callable[[], mx.array]) -> bool:
    reason = refusal_of(lambda: mx.eval(call()))
    if reason is not None:
        click.echo(f"{name} does not run here: {reason}", err=True)
    return reason is None


def steps(model: str, rounds: int, quant_config: Path | None) -> dict[str, dict[str, float]]:
    """One guided step of the model, one picture."""
    subject = open_subject(model, None, Codes(), None)
    pipelines = {"float": subject.exact}
    if quant_config is not None:
        own = open_subject(model, None, Codes(None, quant_config), None)
        pipelines[CONFIG] = with_kernel(own.quantized, None, "static")[0]
    for name, (a_scale, kernel) in VARIANTS.items():
        backend = None if kernel is None else named(kernel)
        pipelines[name] = with_kernel(subject.quantized, backend, a_scale)[0]
    return in_turns({name: step_of(pipeline) for name, pipeline in pipelines.items()}, rounds)


def step_of(pipeline: Pipeline) -> Callable[[], mx.array]:
    defaults = pipeline.defaults
    velocity = pipeline.velocity(pipeline.condition([PROMPT], 4.0), defaults.cfg_weight)
    shape = (1, *pipeline.latent_shape(defaults.height, defaults.width))
    latent = mx.random.normal(shape, key=mx.random.key(0))
    return lambda: velocity(latent, mx.array(0.5))


def shapes(rounds: int, image_tokens: int) -> dict[str, dict[str, dict[str, float]]]:
    """Single layers of SD3-medium, by role and stream."""
    table, here = {}, available(())
    for name, reason in here.left_out.items():
        click.echo(f"{name} does not run here: {reason}", err=True)
    for role, (rows, columns) in SHAPES.items():
        linear = nn.Linear(columns, rows)
        linear.set_dtype(default_dtype())
        layers = {"float": linear}
        for name in here.names:
            runtime = Runtime(backend=BACKENDS[name])
            layers[name] = QuantizedLinear.from_linear(linear, grid=GRID, runtime=runtime)
        for stream, tokens in (("image", image_tokens), ("text", TEXT_TOKENS)):
            x = mx.random.normal((1, tokens, columns), key=mx.random.key(0))
            x = x.astype(linear.weight.dtype)
            calls = {name: caller(layer, x) for name, layer in layers.items()}
            table[f"{role} {stream}, {tokens} x {rows} x {columns}"] = in_turns(calls, rounds)
    return table


def caller(layer: nn.Module, x: mx.array) -> Callable[[], mx.array]:
    """As the pipeline runs it: compiled but on the CPU."""
    call = mx.compile(layer, inputs=layer.state) if compiling_is_faster() else layer
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
@click.option("--quant-config", type=Path, help="That analyze_activations has made.  [none]")
@click.option("--rounds", default=20, help="How often everything is measured.")
@click.option("--with-shapes", is_flag=True, help="Also SD3-medium's layers, one by one.")
@click.option("--image-tokens", default=8192, help="Of both guidance rows; 8192 are 1024 pixels.")
@click.option("--name", default="backends", help="Of the report.")
def main(
    model: str,
    quant_config: Path | None,
    rounds: int,
    with_shapes: bool,
    image_tokens: int,
    name: str,
) -> None:
    """Time a quantized step and every backend."""
    data = {"machine": machine(), "step": steps(model, rounds, quant_config)}
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
