"""Any model's 16-bit checkpoint to an INT8 one, without ever holding it in memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from .cli import command, peak_memory_bytes
from .conversion.format import BLOCK_SIZE, BLOCK_SIZES, BLOCKWISE, SCHEMES, Scheme
from .conversion.layers import MIN_FEATURES, Selection
from .conversion.plan import Plan, described, make_plan, require_layers, summary
from .conversion.reading import Source, open_source
from .conversion.verify import verify as compare
from .conversion.work import convert
from .errors import UserError
from .store import human_bytes, remove_stale_temporaries_of, require_space, require_writable

SUFFIX = ".safetensors"
STOPPED = (
    "stopped; no file is half written; run the same command again, with --force if the output is "
    "there"
)


def convert_to_int8(
    input_checkpoint: str | Path,
    output_checkpoint: str | Path | None = None,
    *,
    block_size: int = BLOCK_SIZE,
    scheme: str = BLOCKWISE,
    checkpoint_key: str | None = None,
    scope_attr: str | None = None,
    skip_keywords: Sequence[str] = (),
    min_features: int = MIN_FEATURES,
    verify: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    force: bool = False,
) -> Plan:
    """Writes the converted checkpoint, or with `dry_run` only says what would be done."""
    selection = Selection(
        Scheme(scheme, block_size), scope_attr, tuple(skip_keywords), min_features
    )
    selection.check()
    with open_source(input_checkpoint, checkpoint_key) as source:
        plan = make_plan(source, selection)
        if dry_run:
            click.echo("\n".join(described(plan)))
        require_layers(plan, source, selection)
        if dry_run:
            click.echo("\n".join(summary(plan)))
            return plan
        output = checked_output(output_checkpoint, source, plan, force)
        if not quiet:
            click.echo("\n".join(summary(plan)))
        remove_stale_temporaries_of(output)
        with bar("converting", plan, quiet) as progress:
            convert(source, plan, output, progress)
        if verify:
            with bar("verifying", plan, quiet) as progress:
                found = compare(source, plan, output, progress)
            click.echo(f"verified {len(plan.converted)} layers: {found.line}")
    return plan


def checked_output(output: str | Path | None, source: Source, plan: Plan, force: bool) -> Path:
    """The path to write to, if that may be done."""
    if output is None:
        raise UserError("an output is needed: name a file with --output_checkpoint, or --dry-run")
    path = Path(output)
    if path.suffix != SUFFIX:
        raise UserError(f"{path} is no name for the output; it must end in {SUFFIX}")
    if path.exists():
        if any(os.path.samefile(path, file) for file in source.files):
            raise UserError(f"{path} is the input, which is never written to; name another output")
        if not force:
            raise UserError(f"{path} exists; replace it with --force, or name another output")
    require_writable(path.parent)
    require_space(path.parent, plan.bytes_out, "the converted checkpoint")
    return path


@contextmanager
def bar(label: str, plan: Plan, quiet: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar over the bytes of the source."""
    with tqdm(
        total=plan.bytes_in, desc=label, unit="B", unit_scale=True, disable=quiet
    ) as progress:
        yield progress.update


def words(given: Sequence[str]) -> list[str]:
    """The words of an option that may be repeated and may hold several, with commas."""
    return [word.strip() for text in given for word in text.split(",")]


@command(stopped=STOPPED)
@click.option(
    "--input_checkpoint",
    "--input",
    required=True,
    help="A .safetensors file, a folder of shards or its index, .npz, .pt, .pth, .bin or .ckpt.",
)
@click.option("--output_checkpoint", "--output", help="The .safetensors file to write.  [required]")
@click.option(
    "--block_size",
    default=BLOCK_SIZE,
    help=f"Columns that share a scale: {', '.join(map(str, BLOCK_SIZES))}.",
)
@click.option("--scheme", default=BLOCKWISE, help=f"{' or '.join(SCHEMES)} scales.")
@click.option("--checkpoint_key", help="Convert what is below this name.  [default: everything]")
@click.option("--scope_attr", help="Only layers below this part of a path.  [default: all]")
@click.option(
    "--skip_keywords", multiple=True, help="Keep layers with one of these, a,b, in a path.  [none]"
)
@click.option("--min_features", default=MIN_FEATURES, help="Keep layers with fewer on a side.")
@click.option("--verify", is_flag=True, help="Read both again, print the cosines.  [off]")
@click.option("--dry-run", is_flag=True, help="Only list every layer, with a reason.  [off]")
@click.option("--quiet", is_flag=True, help="Print errors, and what was asked for, alone.  [off]")
@click.option("--force", is_flag=True, help="Replace an output that exists.  [off]")
def main(skip_keywords: tuple[str, ...], **settings: Any) -> None:
    """Convert a 16-bit checkpoint of any model to INT8.

    \b
    Example:
      python -m src.convert_to_int8 --input model.safetensors --output model-int8.safetensors
    """
    start = time.perf_counter()
    plan = convert_to_int8(skip_keywords=words(skip_keywords), **settings)
    if settings["quiet"] or settings["dry_run"]:
        return
    seconds, peak = time.perf_counter() - start, human_bytes(peak_memory_bytes())
    click.echo(
        f"converted {len(plan.converted)} layers to {settings['output_checkpoint']} "
        f"in {seconds:.1f} s, peak {peak}"
    )


if __name__ == "__main__":
    main()
