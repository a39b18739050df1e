"""How good pictures are: FID, sFID, Inception Score, and fidelity picture by picture."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .cli import command, peak_memory_bytes
from .errors import UserError
from .evaluation.networks import Network, network
from .evaluation.report import check_target, figures_of, headline, write_all
from .evaluation.sources import DTYPES, Drawing, Folder, Order, is_model, is_statistics, open_folder
from .evaluation.statistics import SPLITS, Known, load_statistics
from .evaluation.work import Settings, prepare, run
from .inference.int8 import OFF, Int8, sixteen_bit_self
from .inference.options import int8_options
from .inference.saved import is_saved
from .model_options import model_options
from .models.load import MODELS, SD3, Model, ModelChoice
from .quant.int8_operators import BACKEND_NAMES
from .store import hash_file, human_bytes

PICTURES = "a folder of pictures"
DRAWING = ("prompts", "num_images", "num_steps", "cfg_weight", "kernel", "dtype")  # of an Order
MODEL = f"a model ({', '.join(MODELS)}, a pipeline's or saved folder)"


def evaluate(
    pictures: str | Path | None = None,
    output: str | Path = "evaluation",
    *,
    model: Model | None = None,
    against: str | Path | None = None,
    inception: str | Path | None = None,
    seed: int = 0,
    against_seed: int | None = None,
    save_statistics: str | Path | None = None,
    force: bool = False,
    fid: bool = True,
    paired: bool = True,
    splits: int | None = None,
    batch_size: int = 16,
    **order: Any,
) -> dict[str, Any]:
    """Measures the pictures in a folder, or those that a model draws, and gives all figures.

    `order` are the fields of `evaluation.sources.Order`, named as on the command line.
    """
    settings, drawn = Settings(fid, paired, splits, batch_size), Order(**order)
    statistics = None if save_statistics is None else Path(save_statistics)
    check_target(Path(output), statistics, force)
    eyes = network(inception)
    found = open_found(pictures, model, drawn, seed)
    named = own_reference(found, drawn.int8) if against is None else str(against)
    reference = None if named is None else beside(named, model)
    refuse_unused(drawn, against_seed, found, reference)
    reference_seed = seed if against_seed is None else against_seed
    other = (
        None if reference is None else open_against(reference, eyes, drawn, found, reference_seed)
    )
    evaluation = prepare(found, other, eyes, settings, statistics is not None)
    for note in evaluation.notes:
        click.echo(f"note: {note}", err=True)
    run(evaluation, eyes)
    data = figures_of(evaluation, None if other is None else described(other, reference))
    write_all(evaluation, data, Path(output))
    if statistics is not None:
        evaluation.found.statistics.save(statistics)
    return data


def open_found(
    pictures: str | Path | None, model: Model | None, order: Order, seed: int
) -> Folder | Drawing:
    """What is to be judged."""
    if isinstance(model, ModelChoice) and model.name is None and pictures is not None:
        model = None  # its checkpoint is for --against
    if (pictures is None) == (model is None):
        raise UserError(f"give either --pictures, {PICTURES}, or --model, {MODEL}")
    return open_folder(Path(pictures)) if model is None else order.open(model, seed)


def refuse_unused(
    order: Order, against_seed: int | None, found: Folder | Drawing, reference: Model | None
) -> None:
    """Raises for what is said about drawing where nothing is drawn by it."""
    reference_draws = reference is not None and not is_statistics(reference) and is_model(reference)
    if against_seed is not None and not reference_draws:
        raise UserError("--against-seed is of a model that --against names; leave it out")
    if isinstance(found, Drawing) or reference_draws:
        return
    for name in DRAWING:
        if getattr(order, name) is not None:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is for a model that draws, and here is none; leave it out")


def own_reference(found: Folder | Drawing, int8: Int8 = OFF) -> Model | None:
    """The 16-bit model that a quantized one was made from, if it is known."""
    if isinstance(found, Folder) or not is_saved(found.model):
        return None if isinstance(found, Folder) else sixteen_bit_self(found.model, int8)
    if found.pipeline.name not in MODELS:
        raise UserError(
            f"{found.model} was made from {found.pipeline.name}, which is none of "
            f"{', '.join(MODELS)}; give its folder by --against"
        )
    return found.pipeline.name


def open_against(
    reference: Model, eyes: Network, order: Order, found: Folder | Drawing, seed: int
) -> Folder | Drawing | Known:
    """What the pictures are compared with; a model draws the same prompts in as many steps."""
    if is_statistics(reference):
        return load_statistics(Path(reference), eyes.identity)
    if not is_model(reference):
        return open_folder(Path(reference))
    count = len(found.names)
    steps, weight = order.num_steps, order.cfg_weight
    if isinstance(found, Drawing):
        steps, weight = found.num_steps, found.cfg_weight
    elif order.num_images is not None:
        count = order.num_images
    other = Order(order.prompts, count, steps, weight).open(reference, seed)
    if isinstance(found, Drawing):
        other.pipeline.resize(*found.size)
    return other


def beside(reference: Model, model: Model | None) -> Model:
    """A Stable Diffusion 3 is read from the checkpoint that was given with --model or by itself."""
    if isinstance(model, ModelChoice) and reference in SD3:
        return replace(model, name=reference)
    return reference


def described(other: Folder | Drawing | Known, reference: Model) -> dict[str, Any]:
    """What the pictures were compared with."""
    if isinstance(other, Known):
        statistics = str(reference)
        return {"statistics": statistics, "sha256": hash_file(statistics), "count": other.count}
    return other.described()


@command()
@click.option("--pictures", help=f"What to judge: {PICTURES}.  [none]")
@model_options(help=f"Or {MODEL}, which draws them.  [none]", encodes=True)
@click.option(
    "--against",
    help="A folder, an .npz of statistics, or a model.  [a quantized model's 16-bit self, or none]",
)
@click.option("--output", default="evaluation", help="Folder to write JSON, Markdown and plots to.")
@click.option("--inception", help="Weights of an Inception-v3.  [nano's scorer instead]")
@click.option("--prompts", help="Of models: a file, one a line, or a shipped list.  [the model's]")
@click.option("--num-images", type=int, help="To draw.  [one a prompt]")
@click.option("--seed", default=0, help="Of the first picture; the next ones count up.")
@click.option("--against-seed", type=int, help="Of the model --against.  [the same: pairs]")
@click.option("--num-steps", type=int, help="Sampling steps.  [the model's]")
@click.option("--cfg-weight", type=float, help="Guidance; 0 turns it off.  [the model's]")
@click.option("--kernel", help=f"Of a quantized model: {', '.join(BACKEND_NAMES)}.  [the fastest]")
@click.option("--dtype", help=f"Of --model: {' or '.join(DTYPES)}.  [the device's]")
@click.option("--batch-size", default=16, help="Pictures at once.")
@click.option("--splits", type=int, help=f"Parts for the Inception Score.  [{SPLITS}]")
@click.option("--fid/--no-fid", default=True, help="FID and sFID, which need many pictures.")
@click.option("--paired/--no-paired", default=True, help="Compare pictures of equal names.")
@click.option("--save-statistics", help="An .npz to write, for --against of later runs.  [none]")
@click.option("--force", is_flag=True, help="Replace what an earlier run has written.  [off]")
@int8_options
def main(**options: Any) -> None:
    """Measure how good pictures are, as a set and one by one.

    \b
    Example:
      python -m src.evaluate --model quantized_nano --against nano --output evaluation
    """
    start = time.perf_counter()
    data = evaluate(**options)
    seconds, peak = time.perf_counter() - start, human_bytes(peak_memory_bytes())
    output = options["output"]
    click.echo(f"{headline(data)}: wrote {output} in {seconds:.1f} s, peak {peak}")


if __name__ == "__main__":
    main()
