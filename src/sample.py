"""`ditq sample`: very many pictures, on quantized weights and inputs or on changes of inputs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from .backends import BACKENDS
from .cli import command, peak_memory_bytes
from .evaluation.sources import DTYPES
from .inference.residual_options import AS_THE_TRACK_HAS_IT, SIXTEEN, Inputs, input_options
from .load_adaround_model import NO_CONFIG, QUANT_CONFIG, config_path
from .mass_sampling.plan import KEEPS, Order, make_plan, open_subject
from .mass_sampling.work import GoOn, draw_all
from .model_options import model_options
from .models.load import MODELS, Model
from .store import human_bytes, require_writable


def sample(
    output_dir: str | Path = "samples",
    *,
    model: Model | None = None,
    adaround_output: str | Path = "adaround_output",
    quant_config: str | Path | None = None,
    weight_bit: int | None = None,
    inputs: Inputs = AS_THE_TRACK_HAS_IT,
    kernel: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    go_on: GoOn | None = None,
    **wanted: Any,
) -> Path:
    """Fills `output_dir` and gives its path; goes on where an earlier run was stopped.

    `go_on` is asked before each batch, by its pictures' numbers, and may leave the rest for later.
    `wanted` are the fields of `mass_sampling.plan.Order`, named as on the command line.
    """
    folder, order = Path(output_dir), Order(**wanted)
    require_writable(folder)
    subject = open_subject(
        model,
        weight_bit,
        adaround_output,
        config_path(quant_config),
        kernel=kernel,
        dtype=dtype,
        weights_only=inputs.layers_take_floats,
    )
    plan = make_plan(subject, inputs.options, order)
    for note in subject.notes:
        click.echo(f"note: {note}", err=True)
    return draw_all(plan, folder, force, go_on)


@command()
@click.option("--output-dir", default="samples", help="Folder to fill.")
@click.option("--num-samples", default=64, help="Pictures to draw.")
@click.option("--timesteps", type=int, help="Sampling steps.  [default: the model's]")
@click.option(
    "--weight-bit",
    type=int,
    help=f"Bits that the weights must have; {SIXTEEN}: the model's own.  [default: the artifacts']",
)
@input_options
@model_options(help=f"{', '.join(MODELS)} or a folder.  [default: the weights' own]", encodes=True)
@click.option("--adaround-output", default="adaround_output", help="The weight track's folder.")
@click.option(
    "--quant-config",
    help=f"The activation track's file, or {NO_CONFIG}.  [default: {QUANT_CONFIG}, if it is there]",
)
@click.option("--prompts", help="A file, one a line, or a shipped list.  [the model's]")
@click.option("--seed", default=0, help="Of the first picture; the next ones count up.")
@click.option("--cfg-weight", type=float, help="Guidance; 0 turns it off.  [default: the model's]")
@click.option("--batch-size", default=16, help="Pictures at once.")
@click.option("--keep", default=KEEPS[0], help=f"What is kept: {', '.join(KEEPS)}.")
@click.option("--keep-latents", default=0, help="Of how many first pictures, beside features.")
@click.option("--inception", help="Weights of an Inception-v3, for features.  [nano's scorer]")
@click.option("--kernel", help=f"{', '.join(BACKENDS)}.  [default: each layer's fastest]")
@click.option("--dtype", help=f"Of the 16-bit model: {' or '.join(DTYPES)}.  [the device's]")
@click.option(
    "--force", is_flag=True, help="Start afresh in a folder that holds other work.  [off]"
)
def main(output_dir: str, **settings: Any) -> None:
    """Draw very many pictures with quantized weights and inputs.

    \b
    Example:
      ditq sample --modulate --weight-bit 4 --act-bit 8 --num-samples 2000 --output-dir samples
    """
    start = time.perf_counter()
    folder = sample(output_dir, **settings)
    seconds, peak = time.perf_counter() - start, human_bytes(peak_memory_bytes())
    click.echo(f"{settings['num_samples']} samples are in {folder}, {seconds:.1f} s, peak {peak}")


if __name__ == "__main__":
    main()
