"""The report as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ..store import atomic_write
from .charts import Chart, ladder_bars, line_chart, tier_chart
from .content import Report

TEMPLATES = Path(__file__).parent
SCRIPT = "page.js"
LEAST_TILE, MOST_TILE = 200, 420  # pixels that a picture is at least wide on the page


def write_page(report: Report, path: Path) -> Path:
    """Writes the page and gives its path; the same report gives the same bytes."""
    text = render(report)
    with atomic_write(path) as file:
        file.write(text.encode())
    return path


def render(report: Report) -> str:
    """The page as HTML; whatever the report says is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "decibel": decibel}
    script = (TEMPLATES / SCRIPT).read_text()
    return environment.get_template("page.html").render(
        report=report,
        script=script,
        script_hash=content_hash(script),
        tile=tile_width(report),
        bars=ladder_bars(report.ladder) if report.ladder else [],
        tiers=tier_chart(report.tiers) if report.tiers and len(report.tiers.paths) else None,
        charts=charts(report),
        cost_models=list(dict.fromkeys(m for row in report.costs.values() for m in row)),
    )


def charts(report: Report) -> list[tuple[str, str, Chart]]:
    """Title, explanation and lines of all errors that were measured."""
    over_sigma = line_chart(report.step_db, report.sigmas, "σ, from noise (left) to picture")
    rounding = {} if report.blocks is None else worst_first(report.blocks.by_rung)
    found: list[tuple[str, str, Chart | None]] = [
        ("Over the steps", "Signal to error of what one step gives, in dB.", over_sigma),
        (
            "Through the blocks",
            "Signal to error of what leaves each block of the whole quantized model, in dB.",
            by_block(report.block_db),
        ),
        (
            "What rounding costs each block",
            "Signal to error of one block's output with only its weights rounded, in dB.",
            by_block(rounding),
        ),
    ]
    return [(title, text, chart) for title, text, chart in found if chart is not None]


def worst_first(by_rung: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """The order of a ladder, which files do not keep."""
    return dict(sorted(by_rung.items(), key=lambda rung: np.mean(rung[1])))


def by_block(series: Mapping[str, Sequence[float]]) -> Chart | None:
    count = max((len(values) for values in series.values()), default=0)
    return line_chart(series, range(count), "block")


def data_uri(picture: np.ndarray) -> str:
    """An 8-bit picture as a PNG within the page."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def content_hash(script: str) -> str:
    """What a content security policy calls the one script that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def tile_width(report: Report) -> int:
    """Small pictures are shown twice as large, large ones at most as a column of text."""
    widest = max((pair.reference.shape[1] for pair in report.pairs), default=0)
    return min(max(2 * widest, LEAST_TILE), MOST_TILE)


def decibel(value: float) -> str:
    """One digit behind the point; equal things have no error."""
    return f"{value:.1f}" if math.isfinite(value) else ("equal" if value > 0 else "–")
