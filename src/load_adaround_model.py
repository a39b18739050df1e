"""Inference with both tracks' results: pictures on 4-bit weights, compared, saved, reported."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .backends import BACKENDS
from .cli import Bar, command, peak_memory_bytes
from .errors import UserError
from .generate import output_paths
from .inference.compare import Request
from .inference.int8 import OFF, Int8, refuse_beside_codes
from .inference.open import Quantized, Settings, check_sigmas, open_artifacts
from .inference.options import int8_options
from .inference.residual_options import AS_THE_TRACK_HAS_IT, Inputs, input_options
from .inference.residuals import Options, Work, refuse, refuse_unmatched
from .inference.work import Loaded, Wanted, run_exact, run_quantized
from .model_options import model_options
from .models.load import MODELS, Model
from .models.pipeline import Pipeline
from .models.prompts import load_prompts
from .quant.linear import A_SCALES
from .store import human_bytes

QUANT_CONFIG = "calibration_data/activations/quant_config.json"
NO_CONFIG = "none"  # in the place of a file's name


def load_adaround_model(
    prompts: Sequence[str] = (),
    output_image: str | Path = "quantized.png",
    *,
    adaround_output: str | Path = "adaround_output",
    quant_config: str | Path | None = None,
    model: Model | None = None,
    seed: int = 0,
    num_steps: int | None = None,
    cfg_weight: float | None = None,
    height: int | None = None,
    width: int | None = None,
    kernel: str | None = None,
    a_scale: str = "static",
    weights_only: bool = False,
    modulation_bits: int = 16,
    inputs: Inputs = AS_THE_TRACK_HAS_IT,
    int8: Int8 = OFF,
    **wanted: Any,
) -> Loaded:
    """Draws prompt i with seed + i on the quantized model, which is given back with all files.

    Without prompts it only saves, if told to, or draws the first of the model's evaluation list.
    Where nothing is drawn, `inputs` are only checked: what is saved does not hold them.
    `wanted` are the fields of `inference.work.Wanted`, named as on the command line.
    """
    work = Wanted(output_paths(Path(output_image), max(1, len(prompts))), **wanted)
    if not prompts and work.only_saves:
        work = replace(work, images=[])
    work.check()
    refuse_beside_codes(int8)
    inputs.check_beside(weights_only, a_scale)
    weights_only = weights_only or inputs.layers_take_floats
    settings = Settings(work.kernel(kernel), a_scale, weights_only, modulation_bits)
    artifacts = open_artifacts(model, adaround_output, config_path(quant_config), settings)
    artifacts.pipeline.resize(height, width)
    if work.images and not prompts:
        prompts = load_prompts(f"{artifacts.pipeline.prompts}_evaluation")[:1]
    request = Request.of(artifacts.pipeline, prompts, seed, num_steps, cfg_weight)
    check_sigmas(artifacts, request.sigmas(artifacts.pipeline))
    options = inputs.options
    if options is not None and work.images:
        refuse(artifacts.pipeline, options, work_of(artifacts.pipeline, request))
    elif options is not None:
        refuse_unmatched(artifacts.pipeline, options)
    for note in artifacts.notes:
        click.echo(f"note: {note}", err=True)
    exact = run_exact(artifacts, request, work)
    quantized = artifacts.inject(keep=work.measures)
    del artifacts  # and with it the codes as the files have them, a byte each
    if options is not None and work.save is not None:
        click.echo(f"note: {what_is_saved(quantized, options, work.save)}", err=True)
    if options is not None and work.images:
        quantized = quantize_inputs(quantized, options, request)
    return run_quantized(quantized, request, work, exact)


def quantize_inputs(quantized: Quantized, options: Options, request: Request) -> Quantized:
    """Wraps the layers."""
    work = work_of(quantized.pipeline, request)
    with Bar("scales", request.num_steps) as bar:
        return quantized.quantize_inputs(options, work, click.echo, [bar])


def what_is_saved(quantized: Quantized, options: Options, folder: str | Path) -> str:
    """Of a model whose inputs are still to be quantized here."""
    without = "quantized inputs" if options.modulate is None else "modulation"
    unused = "" if quantized.config is None else "; the quant config's grids are not used there"
    return f"saved without {without}: {folder} runs as {quantized.name}{unused}"


def work_of(pipeline: Pipeline, request: Request) -> Work:
    """Pictures are drawn one by one."""
    return Work.of(pipeline, request.num_steps, request.cfg_weight)


def config_path(given: str | Path | None) -> Path | None:
    """The file that was named; without a name the activation track's own, where it is."""
    if given is None:
        return Path(QUANT_CONFIG) if Path(QUANT_CONFIG).exists() else None
    return None if str(given) == NO_CONFIG else Path(given)


def chosen_prompts(prompt: str | None, file: str | None) -> list[str]:
    if prompt is not None and file is not None:
        raise UserError("--prompt and --prompts exclude each other; give one of them")
    if file is not None:
        return load_prompts(file)
    return [] if prompt is None else [prompt]


@command()
@click.option("--adaround-output", default="adaround_output", help="The weight track's folder.")
@click.option(
    "--quant-config",
    help=f"The activation track's file, or {NO_CONFIG}.  [default: {QUANT_CONFIG}, if it is there]",
)
@click.option("--prompt", help="What to draw.  [default: one that calibration never saw]")
@click.option(
    "--prompts", "file", help="A list instead: a file with one a line, or a shipped one.  [none]"
)
@click.option("--output-image", default="quantized.png", help="PNG; several get a number each.")
@click.option(
    "--compare", is_flag=True, help="Draw with the 16-bit model too, side by side.  [off]"
)
@click.option(
    "--diff-stats", is_flag=True, help="Print how far the two are apart, at what cost.  [off]"
)
@model_options(help=f"{', '.join(MODELS)} or a folder.  [default: the weights' own]", encodes=True)
@click.option("--seed", default=0, help="Of the first picture; the next ones count up.")
@click.option("--num-steps", type=int, help="Sampling steps.  [default: the model's]")
@click.option("--cfg-weight", type=float, help="Guidance; 0 turns it off.  [default: the model's]")
@click.option("--height", type=int, help="In pixels.  [default: the model's]")
@click.option("--width", type=int, help="In pixels.  [default: the model's]")
@click.option("--kernel", help=f"{', '.join(BACKENDS)}.  [default: each layer's fastest]")
@click.option("--a-scale", default="static", help=f"Activation scales: {' or '.join(A_SCALES)}.")
@click.option("--weights-only", is_flag=True, help="Leave activations in 16 bits.  [off]")
@click.option("--modulation-bits", default=16, help="Of the modulation's weights: 8 or 16.")
@click.option(
    "--low-memory", is_flag=True, help="Compute the modulation ahead, then release it.  [off]"
)
@click.option("--save", help="Folder to write the quantized model to.  [default: none]")
@click.option("--report", help="Folder to write report.html to.  [default: none]")
@click.option("--force", is_flag=True, help="Replace the model that --save finds.  [off]")
@input_options
@int8_options
def main(prompt: str | None, file: str | None, **settings: Any) -> None:
    """Draw pictures with the quantized model, and compare it with the 16-bit one.

    \b
    Example:
      python -m src.load_adaround_model --compare --diff-stats --report report \\
        --prompt "a large red star in the center on a night background"
    """
    start = time.perf_counter()
    done = load_adaround_model(chosen_prompts(prompt, file), **settings)
    seconds, peak = time.perf_counter() - start, human_bytes(peak_memory_bytes())
    names = ", ".join(done.described_files())
    click.echo(f"{done.quantized.name}: wrote {names} in {seconds:.1f} s, peak {peak}")


if __name__ == "__main__":
    main()
