"""`ditq generate`: pictures from prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import click

from .backends import staying_packed
from .cli import Bar, command, peak_memory_bytes
from .errors import UserError
from .inference.int8 import OFF, Int8, open_with_int8, reread_of
from .inference.low_memory import low_memory as lowered
from .inference.options import int8_options, streaming_options
from .inference.saved import check_sigmas, is_saved
from .inference.streaming import check_request, streamed
from .model_options import model_options
from .models.load import MODELS, Model
from .report.picture import write_picture
from .sampling import SAMPLERS, Callback
from .store import human_bytes, require_writable


def generate(
    prompts: Sequence[str],
    output: str | Path,
    *,
    model: Model = "nano",
    seed: int = 0,
    num_steps: int | None = None,
    cfg_weight: float | None = None,
    height: int | None = None,
    width: int | None = None,
    sampler: str = "euler",
    eta: float = 0.0,
    kernel: str | None = None,
    low_memory: bool = False,
    int8: Int8 = OFF,
    blocks_in_memory: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> list[Path]:
    """Writes one PNG a prompt and gives their paths; prompt i is drawn with seed + i.

    With `blocks_in_memory` the transformer's other blocks are read when their turn comes.
    """
    streams = blocks_in_memory is not None
    if streams:
        check_request(model, blocks_in_memory, low_memory)
    paths = output_paths(Path(output), len(prompts))
    require_writable(paths[0].parent)
    if low_memory and kernel is None and is_saved(model):
        kernel = staying_packed()
    pipeline = open_with_int8(model, kernel=kernel, int8=int8)
    check_sigmas(pipeline.transformer, pipeline.sigmas(num_steps)[:-1].tolist())
    pipeline.check(prompts)
    seeds = [seed + i for i in range(len(prompts))]
    reread = reread_of(model, int8) if low_memory or streams else None
    with (
        lowered(pipeline, reread) if low_memory else nullcontext(),
        streamed(pipeline, blocks_in_memory, reread) if streams else nullcontext(),
    ):
        latent = pipeline.sample(
            prompts,
            seeds,
            num_steps=num_steps,
            cfg_weight=cfg_weight,
            height=height,
            width=width,
            sampler=sampler,
            eta=eta,
            callbacks=callbacks,
        )
    pictures = pipeline.finish(latent)
    for path, picture, prompt, own_seed in zip(paths, pictures, prompts, seeds, strict=True):
        write_picture(path, picture, prompt=prompt, seed=own_seed, model=pipeline.name)
    return paths


def output_paths(output: Path, count: int) -> list[Path]:
    """x.png for one picture; x-0.png, x-1.png … for several."""
    if output.suffix.lower() != ".png":
        raise UserError(f"output {output} must end in .png")
    if output.is_dir():
        raise UserError(f"output {output} is a folder; give the name of a picture in it")
    if count == 0:
        raise UserError("no prompt given; at least one is needed")
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{i}") for i in range(count)]


@command()
@model_options("nano", f"Name ({', '.join(MODELS)}), a pipeline's or saved folder.", encodes=True)
@click.option("--prompt", "prompts", multiple=True, required=True, help="Repeat it for several.")
@click.option("--output", default="picture.png", help="PNG to write; several get a number each.")
@click.option("--seed", default=0, help="Of the first picture; the next ones count up.")
@click.option(
    "--steps", "--num-steps", "num_steps", type=int, help="Sampling steps.  [the model's]"
)
@click.option("--cfg-weight", type=float, help="Guidance; 0 turns it off.  [the model's]")
@click.option("--height", type=int, help="In pixels.  [the model's]")
@click.option("--width", type=int, help="In pixels.  [the model's]")
@click.option("--sampler", default="euler", help=f"One of: {', '.join(SAMPLERS)}.")
@click.option("--eta", default=0.0, help="Share of fresh noise a step, for ddim.")
@click.option("--kernel", help="Of a quantized model: how it multiplies.  [the fastest]")
@click.option(
    "--low-memory", is_flag=True, help="Keep no modulation weights while denoising.  [off]"
)
@int8_options
@streaming_options
def main(prompts: tuple[str, ...], output: str, **settings: object) -> None:
    """Draw pictures from prompts.

    \b
    Example:
      ditq generate --prompt "a large red star in the center on a night background"
    """
    start = time.perf_counter()
    with Bar("sampling") as bar:
        paths = generate(prompts, output, callbacks=[bar], **settings)
    seconds = time.perf_counter() - start
    names = ", ".join(map(str, paths))
    click.echo(f"wrote {names} in {seconds:.1f} s, peak {human_bytes(peak_memory_bytes())}")


if __name__ == "__main__":
    main()
