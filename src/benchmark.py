"""What quantization costs and saves: seconds a step and a picture, and memory, kernel by kernel."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .backends import BACKENDS
from .benchmarking.kernels import available
from .benchmarking.opening import DTYPES, Order, open_all
from .benchmarking.report import check_target, figures_of, headline, page_lines, write_all
from .benchmarking.subjects import Codes
from .benchmarking.work import Benchmark, Rounds, make_rows, run
from .cli import command, peak_memory_bytes
from .inference.options import int8_options
from .inference.residuals import ALL, AUTO
from .load_adaround_model import NO_CONFIG, QUANT_CONFIG, config_path
from .model_options import model_options
from .models.load import MODELS, Model
from .quant.linear import A_SCALES
from .store import human_bytes


def benchmark(
    output: str | Path = "benchmark",
    *,
    model: Model = "nano",
    kernels: Sequence[str] = (),
    warm_up: int = 1,
    repeats: int = 5,
    force: bool = False,
    adaround_output: str | Path | None = None,
    quant_config: str | Path | None = None,
    **order: Any,
) -> dict[str, Any]:
    """Times the model in floats and quantized, under each kernel, in turns; gives all figures.

    Without `adaround_output` codes are the nearest ones, without `quant_config` all inputs have one
    scale: neither changes the time. `order` are the further fields of `benchmarking.opening.Order`.
    """
    rounds, found = Rounds(warm_up, repeats), available(kernels)
    check_target(Path(output), force)
    config = quant_config
    if adaround_output is not None or quant_config is not None:
        config = config_path(quant_config)
    wanted = Order(Codes(adaround_output, config), **order)
    opened = open_all(model, wanted, found, bool(kernels), say)
    maker, left_out = opened.maker, dict(found.left_out)
    rows = make_rows(maker, opened.specs, left_out)
    for name, reason in left_out.items():
        say(f"{name} is not run: {reason}")
    for note in maker.notes:
        say(note)
    done = Benchmark(maker.job, rounds, run(rows, maker.job, rounds), left_out, maker.notes)
    data = figures_of(done, opened.described)
    write_all(data, Path(output))
    return data


def say(line: str) -> None:
    click.echo(f"note: {line}", err=True)


@command()
@model_options("nano", f"Name ({', '.join(MODELS)}), a pipeline's or saved folder.", encodes=True)
@click.option("--output", default="benchmark", help="Folder to write JSON, Markdown and a plot to.")
@click.option(
    "--kernel", "kernels", multiple=True, help=f"{', '.join(BACKENDS)}; repeat it.  [all]"
)
@click.option("--adaround-output", help="The weight track's folder.  [nearest codes]")
@click.option(
    "--quant-config",
    help=f"The activation track's file, or {NO_CONFIG}.  [with --adaround-output: {QUANT_CONFIG}, "
    "if it is there; else one scale]",
)
@click.option(
    "--a-scale", help=f"Activation scales: {' or '.join(A_SCALES)}.  [static, or the saved model's]"
)
@click.option(
    "--modulate",
    default=ALL,
    help=f"Rows that quantize changes of inputs: {ALL}, {AUTO}, a part of layers' paths, or none.",
)
@click.option("--modulate-memory", type=float, help="GB that modulation may keep.  [no limit]")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    help=f"Of the model in floats: {', '.join(DTYPES)}; repeat it, all rows are compared with the "
    "first.  [the device's, and float32]",
)
@click.option("--batch-size", default=1, help="Pictures at once.")
@click.option("--num-steps", type=int, help="Sampling steps of a picture.  [the model's]")
@click.option("--cfg-weight", type=float, help="Guidance; 0 turns it off.  [the model's]")
@click.option("--height", type=int, help="In pixels.  [the model's]")
@click.option("--width", type=int, help="In pixels.  [the model's]")
@click.option("--warm-up", default=1, help="Rounds that do not count.")
@click.option("--repeats", default=5, help="Rounds that count.")
@click.option("--force", is_flag=True, help="Replace what an earlier run has written.  [off]")
@int8_options
def main(output: str, **settings: Any) -> None:
    """Time a step and a picture, quantized and not, and say where quantized is slower.

    \b
    Example:
      python -m src.benchmark --model nano --num-steps 10 --repeats 3 --output benchmark
    """
    start = time.perf_counter()
    data = benchmark(output, **settings)
    seconds, peak = time.perf_counter() - start, human_bytes(peak_memory_bytes())
    click.echo("\n".join(page_lines(data)))
    click.echo(f"{headline(data)}: wrote {output} in {seconds:.1f} s, peak {peak}")


if __name__ == "__main__":
    main()
