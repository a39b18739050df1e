"""The loader's work: what the 16-bit model does first, then what the quantized one does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
from tqdm import tqdm

from ..backends import UNPACKING, staying_packed
from ..cli import Bar
from ..errors import UserError
from ..report.content import Rung
from ..report.page import write_page
from ..report.picture import write_picture
from ..store import require_writable
from .compare import Compared, Drawn, Measured, Request, compare, draw, measure, reference_of
from .export import check_target, save_model
from .ladder import ladder, largest_inputs, rung_count
from .low_memory import low_memory
from .open import Artifacts, Quantized
from .pictures import compare_paths, write_side_by_side
from .summary import comparison_report, measured_lines, picture_lines

TRAILS = 8  # pictures of which every step is kept and compared
LADDER_STEPS = 6  # of each of them, about, on which the ladder is measured
PAGE = "report.html"


@dataclass(frozen=True)
class Wanted:
    """What is to be made, named as on the command line."""

    images: list[Path]  # one a prompt
    compare: bool = False
    diff_stats: bool = False
    low_memory: bool = False
    save: str | Path | None = None
    report: str | Path | None = None
    force: bool = False

    @property
    def measures(self) -> bool:
        return self.diff_stats or self.report is not None

    @property
    def compares(self) -> bool:
        return self.compare or self.measures

    @property
    def only_saves(self) -> bool:
        return self.save is not None and not self.compares

    def check(self) -> None:
        """Raises where something could not be written."""
        folders = [path.parent for path in self.images[:1]]
        if self.save is not None:
            check_target(Path(self.save), self.force)
            folders.append(Path(self.save).parent)
        if self.report is not None:
            folders.append(Path(self.report))
        for folder in folders:
            require_writable(folder)

    def kernel(self, given: str | None) -> str | None:
        """With --low-memory the one that keeps weights packed, unless another is asked for."""
        if self.low_memory and given in UNPACKING:
            raise UserError(
                f"--low-memory and --kernel {given} exclude each other; use {staying_packed()}"
            )
        return staying_packed() if self.low_memory and given is None else given


@dataclass(frozen=True)
class Exact:
    """What the 16-bit model gave."""

    drawn: list[Drawn] = field(default_factory=list)
    ladder: list[Rung] = field(default_factory=list)


@dataclass(frozen=True)
class Loaded:
    """What was made: the model itself, figures, and every file that was written."""

    quantized: Quantized
    compared: list[Compared]
    measured: Measured | None
    ladder: list[Rung]
    files: list[Path]
    saved: Path | None = None  # one of them

    def described_files(self) -> list[str]:
        """A saved model with its own name, where that is not the name of what drew."""
        own = saved_name(self.quantized)
        beside = "" if own == self.quantized.name else f" ({own})"
        return [f"{path}{beside if path == self.saved else ''}" for path in self.files]


def run_exact(artifacts: Artifacts, request: Request, wanted: Wanted) -> Exact:
    """The pictures to compare with and the ladder, before the model is quantized: at no time are
    there two of it."""
    if not wanted.compares:
        return Exact()
    with Bar("16-bit", request.num_steps * len(request.prompts)) as bar:
        drawn = draw(artifacts.pipeline, request, [bar], TRAILS if wanted.measures else 0)
    return Exact(drawn, ladder_of(artifacts, request, drawn) if wanted.report is not None else [])


def ladder_of(artifacts: Artifacts, request: Request, drawn: Sequence[Drawn]) -> list[Rung]:
    """On some steps of the pictures' own ways."""
    references = [
        reference_of(artifacts.pipeline, request, index, one.trail, LADDER_STEPS)
        for index, one in enumerate(drawn)
        if one.trail is not None
    ]
    largest = None
    if artifacts.config is not None:
        largest = largest_inputs(artifacts.sources.quant_config.parent, artifacts.config)
    with tqdm(total=rung_count(artifacts, largest), desc="ladder", unit="rung") as bar:
        return ladder(artifacts, references, largest, bar.update)


def run_quantized(quantized: Quantized, request: Request, wanted: Wanted, exact: Exact) -> Loaded:
    """Draws, compares, writes."""
    label = quantized.name
    with Bar(label, request.num_steps * len(request.prompts)) as bar:
        with low_memory(quantized.pipeline) if wanted.low_memory else nullcontext():
            found = draw(quantized.pipeline, request, [bar], TRAILS if wanted.measures else 0)
    compared = compare(request, exact.drawn, found) if wanted.compares else []
    files = write_pictures(quantized, request, wanted, found, compared)
    measured = None
    if wanted.measures:
        measured = measure(quantized, request, exact.drawn[0].trail)
    if wanted.diff_stats:
        click.echo("\n".join([*picture_lines(compared), *measured_lines(compared, measured)]))
    if wanted.report is not None:
        report = comparison_report(quantized, request, compared, measured, exact.ladder)
        files.append(write_page(report, Path(wanted.report) / PAGE))
    saved = None
    if wanted.save is not None:
        saved = save(quantized, Path(wanted.save), wanted.force)
        files.append(saved)
    return Loaded(quantized, compared, measured, exact.ladder, files, saved)


def write_pictures(
    quantized: Quantized,
    request: Request,
    wanted: Wanted,
    found: Sequence[Drawn],
    compared: Sequence[Compared],
) -> list[Path]:
    """The quantized model's, and with --compare the other's and both side by side."""
    files = []
    for index, (path, one) in enumerate(zip(wanted.images, found, strict=True)):
        texts = {
            "prompt": request.prompts[index],
            "seed": request.seeds[index],
            "model": quantized.pipeline.name,
        }
        files.append(write_picture(path, one.picture, **texts))
        if wanted.compare:
            exact, both = compare_paths(path)
            files.append(write_picture(exact, compared[index].reference, **texts))
            files.append(write_side_by_side(both, compared[index], quantized.name))
    return files


def save(quantized: Quantized, folder: Path, force: bool) -> Path:
    """Without wrappers, and so without what these did to inputs."""
    settings = {
        "weights": f"{quantized.bits} bits, {quantized.method}",
        "runs as": saved_name(quantized),
    }
    with quantized.without_wrappers() as pipeline:
        return save_model(
            pipeline, folder, made_from=quantized.sources.hashes, settings=settings, force=force
        )


def saved_name(quantized: Quantized) -> str:
    """Of what is saved, such as W4A16."""
    return replace(quantized, inputs=None).name
