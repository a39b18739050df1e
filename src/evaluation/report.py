"""What was measured: as JSON for programs, as Markdown and plots for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import __version__
from ..errors import UserError
from ..metrics.frechet import Moments
from ..store import require_writable, write_bytes, write_json
from .accuracy import accuracy_summary
from .plots import plot_all
from .statistics import has_score
from .work import Evaluation, Side

FORMAT, VERSION = "ditq-evaluation", 1
NUMBERS, PAGE = "evaluation.json", "evaluation.md"
PAIRED_NAMES = {"psnr": "PSNR, dB", "ssim": "SSIM", "latent": "latent SQNR, dB"}


def check_target(output: Path, statistics: Path | None, force: bool) -> None:
    """Raises where something could not be written, or would replace finished work."""
    if statistics is not None and statistics.suffix.lower() != ".npz":
        raise UserError(f"--save-statistics {statistics} must end in .npz")
    for path in [output / NUMBERS, *([] if statistics is None else [statistics])]:
        require_writable(path.parent)
        if path.exists() and not force:
            raise UserError(f"{path} is there already; give another name, or --force to replace it")


def figures_of(evaluation: Evaluation, against: dict[str, Any] | None) -> dict[str, Any]:
    """Everything in numbers; `against` says what the pictures were compared with."""
    found = evaluation.found
    data: dict[str, Any] = {
        "pictures": found.source.described(),
        "against": against,
        "network": found.statistics.identity.described(),
        "inception_score": score_summary(found),
        "notes": evaluation.notes,
        "device": str(mx.default_device().type).removeprefix("DeviceType."),
        "versions": {"ditq": __version__, "mlx": mx.__version__},
    }
    if isinstance(evaluation.against, Side):
        data["against_inception_score"] = score_summary(evaluation.against)
    if evaluation.settings.fid and evaluation.other is not None:
        known = found.statistics.known
        data["fid"] = distance(known.pooled, evaluation.other.pooled)
        if evaluation.other.spatial is not None:
            data["sfid"] = distance(known.spatial, evaluation.other.spatial)
    if found.verdicts is not None:
        reference = getattr(evaluation.against, "verdicts", None)
        paired = evaluation.pairs is not None
        data["accuracy"] = accuracy_summary(found.verdicts, reference, paired)
    if evaluation.pairs is not None:
        data["paired"] = evaluation.pairs.summary() | {"pictures": evaluation.pairs.each()}
    if evaluation.velocities is not None:
        data["velocity"] = evaluation.velocities.summary()
    return data


def score_summary(side: Side) -> dict[str, Any]:
    score, splits = side.statistics.score, side.statistics.splits
    known = has_score(score.count, splits)
    return {
        "mean": score.mean if known else None,
        "deviation": score.deviation if known else None,
        "splits": splits,
        "classes": side.statistics.identity.classes,
    }


def distance(one: Moments, two: Moments) -> dict[str, float]:
    """The Fréchet distance and its two parts."""
    means, covariances = one.parts(two)
    return {"value": means + covariances, "means": means, "covariances": covariances}


def write_all(evaluation: Evaluation, data: dict[str, Any], output: Path) -> list[Path]:
    """Plots, Markdown, and the JSON last."""
    plots = plot_all(evaluation, output)
    page = output / PAGE
    write_bytes(page, "\n".join([*page_lines(data), *plot_lines(plots), ""]).encode())
    write_json(output / NUMBERS, {"format": FORMAT, "version": VERSION, **data})
    return [output / NUMBERS, page, *plots]


def page_lines(data: dict[str, Any]) -> list[str]:
    network = data["network"]
    lines = ["# Evaluation", "", *described("Pictures", data["pictures"])]
    if data["against"] is not None:
        lines += described("Against", data["against"])
    lines += [
        f"- Features: {network['name']} (sha256 {network['sha256'][:16]}), {network['pooled']} "
        f"pooled, {network['spatial']} spatial, {network['classes']} classes",
        *(f"- Note: {note}" for note in data["notes"]),
        "",
        *set_lines(data),
    ]
    for name, make in (("accuracy", accuracy_lines), ("paired", paired_lines)):
        lines += make(data[name]) if name in data else []
    return lines + (velocity_lines(data["velocity"]) if "velocity" in data else [])


def described(title: str, source: dict[str, Any]) -> list[str]:
    parts = (f"{name} {value}" for name, value in source.items() if name != "sha256")
    digest = f", sha256 {source['sha256'][:16]}" if "sha256" in source else ""
    return [f"- {title}: {', '.join(parts)}{digest}"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def set_lines(data: dict[str, Any]) -> list[str]:
    """The figures of the sets as wholes."""
    rows = [
        [label, f"{data[name]['value']:.4f}", split_text(data[name])]
        for name, label in (("fid", "FID"), ("sfid", "sFID"))
        if name in data
    ]
    names = {"inception_score": "Inception Score", "against_inception_score": "the same, against"}
    rows += [[label, *score_cells(data[name])] for name, label in names.items() if name in data]
    return [*table(["", "value", ""], rows), ""]


def split_text(parts: dict[str, float]) -> str:
    return f"means {parts['means']:.4f}, covariances {parts['covariances']:.4f}"


def score_cells(score: dict[str, Any]) -> list[str]:
    mean = score_text(score["mean"])
    if score["mean"] is None:
        return [mean, f"too few pictures for {score['splits']} parts"]
    if score["deviation"] is None:
        return [mean, f"one part, of at most {score['classes']}"]
    return [
        mean,
        f"± {score['deviation']:.3f} over {score['splits']} parts, of at most {score['classes']}",
    ]


def score_text(mean: float | None) -> str:
    return "—" if mean is None else f"{mean:.3f}"


def accuracy_lines(accuracy: dict[str, dict[str, Any]]) -> list[str]:
    rows = []
    for name, row in accuracy.items():
        cells = [name, f"{percent(row['share'])} ({' to '.join(map(percent, row['interval']))})"]
        cells.append(percent(row["against"]) if "against" in row else "")
        difference = ""
        if "difference" in row:
            low, high = (f"{100 * bound:+.2f}" for bound in row["difference_interval"])
            difference = f"{100 * row['difference']:+.2f} ({low} to {high})"
        rows.append([*cells, difference])
    head = ["right, %", "pictures (95 %)", "against", "difference (95 %)"]
    return ["## What the captions say", "", *table(head, rows), ""]


def percent(share: float) -> str:
    return f"{100 * share:.2f}"


def paired_lines(paired: dict[str, Any]) -> list[str]:
    rows = [
        [
            PAIRED_NAMES[name],
            number(row["median"], name),
            span(row["median_interval"], name),
            number(row["worst"], name),
            number(row["mean"], name),
            span(row["mean_interval"], name),
        ]
        for name, row in paired["figures"].items()
    ]
    head = ["", "median", "95 %", "worst", "mean", "95 %"]
    count = f"{paired['count']} pairs, of which {paired['equal']} are equal."
    return ["## Picture by picture", "", count, "", *table(head, rows), ""]


def number(value: float | None, name: str) -> str:
    """What is infinite is shown as such; only equal pictures are."""
    if value is None:
        return "∞"
    return f"{value:.4f}" if name == "ssim" else f"{value:.2f}"


def span(bounds: Sequence[float] | None, name: str) -> str:
    return "none" if bounds is None else " to ".join(number(bound, name) for bound in bounds)


def velocity_lines(velocity: dict[str, Any]) -> list[str]:
    mean, bounds = number(velocity["mean"], "db"), span(velocity["mean_interval"], "db")
    return [
        "## Velocity on the reference's latents",
        "",
        f"SQNR {mean} dB (95 %: {bounds}), mean over the steps of {velocity['captions']} captions.",
        "",
    ]


def plot_lines(plots: Sequence[Path]) -> list[str]:
    return [f"![{path.stem}]({path.name})" for path in plots]


def headline(data: dict[str, Any]) -> str:
    """The figures that matter most, for the last line."""
    parts = [
        f"{label} {data[name]['value']:.4f}"
        for name, label in (("fid", "FID"), ("sfid", "sFID"))
        if name in data
    ]
    parts.append(f"Inception Score {score_text(data['inception_score']['mean'])}")
    if "accuracy" in data:
        parts.append(f"all right {percent(data['accuracy']['all']['share'])} %")
    if "paired" in data:
        parts.append(f"median PSNR {number(data['paired']['figures']['psnr']['median'], 'db')} dB")
    if "velocity" in data:
        parts.append(f"velocity {number(data['velocity']['mean'], 'db')} dB")
    return ", ".join(parts)
