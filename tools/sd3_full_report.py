"""What the full-size benchmark found, as JSON a model and one table of all models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from src.models.load import SD3

from tools.bench_common import meanwhile

NAME = "sd3_full"
COPIES = 1.5  # of the 16-bit transformer: less than this is not two
JUDGED_BYTES = 10**9  # below this, Python itself outweighs the model


def write(folder: Path, data: dict[str, Any]) -> None:
    """One run's figures, and the page of all runs that lie there."""
    folder.mkdir(parents=True, exist_ok=True)
    own = "_" + re.sub(r"\W+", "-", data["run"]) if data.get("run") else ""
    (folder / f"{NAME}_{data['model']}{own}.json").write_text(json.dumps(data, indent=2) + "\n")
    found = [folder / f"{NAME}_{model}.json" for model in SD3]
    found += [path for model in SD3 for path in sorted(folder.glob(f"{NAME}_{model}_*.json"))]
    models = [json.loads(path.read_text()) for path in found if path.is_file()]
    lines = ["# Stable Diffusion 3 at full size, random weights", "", *explanation()]
    for model in models:
        lines += ["", *section(model)]
    (folder / f"{NAME}.md").write_text("\n".join([*lines, ""]))


def explanation() -> list[str]:
    return [
        "A whole checkpoint of seeded random weights in Stability's layout, then the stages as a",
        "user runs them, each a process of its own. Seconds are of the process, Python's start and",
        "imports included; they hold for the settings that are named, which are far smaller than",
        "those of real work. MLX is the most that MLX held on the device, process the most of the",
        "machine's memory, in decimal GB. Copies is the larger of the two, without what the",
        "process began with, over the 16-bit transformer's bytes on disk; below "
        f"{COPIES:g} passes. Told",
        "is what `ditq doctor --sd3` counts for a picture with the run's text encoders, where each",
        "kernel ends before the next; what kernels under way on a GPU hold comes on top. The",
        "pictures show noise.",
    ]


def section(data: dict[str, Any]) -> list[str]:
    where, used = data["machine"], data["settings"]
    size = data.get("transformer_bytes")
    held = f"{size / 2e9:.2f} billion weights, {gigabytes(size)} GB" if size else "not written"
    lines = [
        f"## {data['model']}{' (tiny)' if data['tiny'] else ''}"
        f"{', ' + data['run'] if data.get('run') else ''}",
        "",
        f"Transformer: {held}. {used['images']} images of {used['steps']} steps, every "
        f"{used['stride']}. replayed, one at a time; tier A8 alone, judged on 1 stored step, "
        f"smoothing of spikes; all blocks by `{used['method']}`, blocks {used['learned']} by "
        f"AdaRound with {used['iters']} iterations of {used['batch_size']} rows; text encoders "
        f"{'with' if used['t5'] else 'without'} T5, saved at {used['encoder_bits']} bits; "
        f"pictures of {used['steps']} steps with guidance.",
        "",
        "| stage | pixels | s | MLX | process | told | copies | on disk |",
        "|---|---|---:|---:|---:|---:|---|---:|",
        *(table_row(row, size) for row in data["rows"]),
    ]
    if planted := data.get("planted"):
        found = f"{planted['smoothed']} of {planted['inputs']}"
        lines += ["", f"Inputs with planted outlier channels that were smoothed: {found}."]
    return [
        *lines,
        "",
        verdict(data),
        *meanwhile(data),
        "",
        f"`{where['command']}` on {where['device']} ({where['cores']} cores, {where['system']}), "
        f"MLX {where['mlx']}, Python {where['python']}, {where['date']}.",
    ]


def table_row(row: dict[str, Any], transformer_bytes: int | None) -> str:
    cells = [row["name"], f"{row['pixels']}²" if row["pixels"] else ""]
    if row["status"] == "not run":
        return f"| {cells[0]} | {cells[1]} | not run | | | | | |"
    seconds = f"{row['seconds']:.1f}"
    if row["status"] != "done":
        return f"| {cells[0]} | {cells[1]} | {seconds} | {row['error'].replace('|', '/')} | | | | |"
    told = gigabytes(row["told_bytes"]) if row.get("told_bytes") else ""
    disk = gigabytes(row["disk_bytes"]) if row.get("disk_bytes") else ""
    mlx, process = gigabytes(row["mlx_peak_bytes"]), gigabytes(row["process_peak_bytes"])
    copies = copies_cell(row, transformer_bytes)
    return f"| {' | '.join([*cells, seconds, mlx, process, told, copies, disk])} |"


def copies_of(row: dict[str, Any], transformer_bytes: int | None) -> float | None:
    """How many 16-bit transformers the process held at most; none where that tells nothing."""
    if not row["one_copy"] or row["status"] != "done" or not transformer_bytes:
        return None
    host = row["process_peak_bytes"] - row["process_start_bytes"]
    return max(host, row["mlx_peak_bytes"]) / transformer_bytes


def copies_cell(row: dict[str, Any], transformer_bytes: int | None) -> str:
    copies = copies_of(row, transformer_bytes)
    if copies is None:
        return ""
    if transformer_bytes < JUDGED_BYTES:
        return f"{copies:.2f}, too small to judge"
    return f"{copies:.2f}, {'pass' if copies < COPIES else 'FAIL'}"


def verdict(data: dict[str, Any]) -> str:
    """Whether converting, saving and loading did without a second copy."""
    judged = [row for row in data["rows"] if row["one_copy"]]
    size = data.get("transformer_bytes")
    found = [copies_of(row, size) for row in judged]
    known = [copies for copies in found if copies is not None]
    if not known or size < JUDGED_BYTES:
        return "Without two copies: not judged."
    passed = sum(copies < COPIES for copies in known)
    return (
        f"Without two copies: {passed} of {len(judged)} processes that convert, save or load pass, "
        f"{len(judged) - len(known)} did not finish."
    )


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}"
