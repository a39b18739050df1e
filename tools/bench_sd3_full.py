"""Every stage of a full-size Stable Diffusion 3 with random weights: seconds and peak memory.

    python -m tools.bench_sd3_full --model sd3.5-large --work FOLDER --seconds 540

Writes a whole checkpoint (28 GB with T5 for sd3.5-large), then runs the stages on it, each as a
process of its own, and after each of them docs/benchmarks/sd3_full_MODEL.json and sd3_full.md.
All else lies in FOLDER/sd3_full, which is this command's own: what an earlier run left there goes.
With --tiny the same on a model of a few megabytes, which a CPU does in a minute or two; its report
goes there too. Needs the extra [sd3] and no network; meant for a GPU.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import src  # noqa: F401  before mlx, for OpenBLAS
from src.inference.sd3_memory import phases
from src.models.load import SD3
from src.models.sd3_files import PUBLISHED, TRANSFORMER
from src.quant.artifacts import QuantConfig
from src.quant.block_rounding import METHODS
from src.store import human_bytes, read_header

import click

from tools import sd3_full_report
from tools.bench_common import FOLDER, environment, machine
from tools.bench_sd3_activations import outlier_paths
from tools.sd3_full_stages import CHECKPOINT, CONFIG, CONVERTED, Settings, Stage, stages
from tools.sd3_full_weights import Shapes

OWN = "sd3_full"  # folder in --work, where names may be those of the user's own artifacts
TINY_PIXELS = (64, 128)


class Bench:
    """One model's run in one folder, and what it has found so far."""

    def __init__(
        self,
        settings: Settings,
        tiny: bool,
        work: Path,
        report: Path,
        note: str = "",
        run: str = "",
    ) -> None:
        self.settings, self.tiny, self.work, self.report = settings, tiny, work, report
        self.data: dict[str, Any] = {
            "machine": machine(),
            "model": settings.model,
            "run": run,
            "tiny": tiny,
            "settings": settings.described(),
            "note": note,
            "rows": [],
        }

    def run(self, seconds: float) -> None:
        """All stages, as far as the time allows."""
        end, todo = time.monotonic() + seconds, stages(self.settings, self.tiny)
        for index, stage in enumerate(todo):
            left = end - time.monotonic()
            row = self.measured(stage, left) if left > 0 else not_run(stage)
            self.data["rows"][index:] = [row, *map(not_run, todo[index + 1 :])]
            self.note_sizes(stage)
            sd3_full_report.write(self.report, self.data)
            if row["status"] != "not run":
                click.echo(line(row))

    def measured(self, stage: Stage, limit: float) -> dict[str, Any]:
        """Runs one stage in a process of its own, for at most `limit` seconds."""
        figures, log = self.work / "figures.json", self.work / "log.txt"
        figures.unlink(missing_ok=True)
        words = [sys.executable, "-m", "tools.sd3_full_stage", str(figures), stage.module]
        start = time.perf_counter()
        with log.open("w") as output:
            process = subprocess.Popen(
                [*words, *stage.arguments],
                cwd=self.work,
                env=offline(),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                status = "done" if process.wait(limit) == 0 else "failed"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status = "cut off"
        row = {**described(stage), "status": status, "seconds": time.perf_counter() - start}
        if figures.is_file():
            row |= json.loads(figures.read_text())
        if status != "done":
            row["error"] = f"{status}: {last_line(log)}"
        if stage.output is not None and status == "done":
            row["disk_bytes"] = disk_bytes(self.work / stage.output)
        if stage.precision is not None and not self.tiny:
            found = phases(
                self.settings.model,
                stage.precision,
                stage.pixels,
                stage.pixels,
                t5=self.settings.t5,
            )
            row["told_bytes"] = max(phase.bytes for phase in found)
        return row

    def note_sizes(self, stage: Stage) -> None:
        """What the report says of the model itself, once it is known."""
        file = self.work / CHECKPOINT / PUBLISHED[self.settings.model].file
        if stage.output == CHECKPOINT and file.is_file():
            tensors = read_header(file)[0].items()
            own = (info.nbytes for name, info in tensors if name.startswith(TRANSFORMER))
            self.data["transformer_bytes"] = sum(own)
        if stage.module == "src.analyze_activations" and (self.work / CONFIG).is_file():
            layers = QuantConfig.load(self.work / CONFIG).layers
            planted = set(outlier_paths(Shapes.of(self.settings.model, self.tiny).transformer))
            smoothed = sum(layers[path].smoothing is not None for path in planted)
            self.data["planted"] = {"inputs": len(planted), "smoothed": smoothed}


def offline() -> dict[str, str]:
    """This process's environment, but for what would reach another checkpoint or the network."""
    kept = {name: value for name, value in environment().items() if name != "DITQ_CHECKPOINT"}
    return {**kept, "HF_HUB_OFFLINE": "1"}


def described(stage: Stage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "command": stage.command,
        "pixels": stage.pixels,
        "one_copy": stage.one_copy,
    }


def not_run(stage: Stage) -> dict[str, Any]:
    return {**described(stage), "status": "not run"}


def last_line(log: Path) -> str:
    """The last that a process said, without what a progress bar painted over."""
    lines = [
        part.strip() for part in log.read_text(errors="replace").replace("\r", "\n").split("\n")
    ]
    return next((text for text in reversed(lines) if text), "it said nothing")


def disk_bytes(path: Path) -> int:
    """Of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def line(row: dict[str, Any]) -> str:
    found = f"{row['name']} {row['pixels'] or ''}: {row['seconds']:.1f} s"
    if "mlx_peak_bytes" in row:
        peaks = [human_bytes(row[key]) for key in ("mlx_peak_bytes", "process_peak_bytes")]
        found += f", MLX {peaks[0]}, process {peaks[1]}"
    return f"{found}, {row['error']}" if "error" in row else found


def emptied(work: Path) -> Path:
    """The benchmark's own folder there, without what an earlier run left, but for logs."""
    work = work.resolve() / OWN
    for name in (CHECKPOINT, "calibration_data", "adaround_output", "learned", "saved"):
        shutil.rmtree(work / name, ignore_errors=True)
    (work / CONVERTED).unlink(missing_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    return work


@click.command()
@click.option("--model", type=click.Choice(SD3), default="sd3-medium", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Folder to work in.  [temporary]")
@click.option("--seconds", default=3600.0, show_default=True, help="For all stages together.")
@click.option("--pixels", multiple=True, type=int, help="Sides of pictures.  [512 and 1024]")
@click.option("--t5/--no-t5", default=True, show_default=True, help="Its 9.5 GB.")
@click.option("--method", type=click.Choice(METHODS), default=Settings.method, show_default=True)
@click.option("--learned", default=Settings.learned, show_default=True, help="Blocks, by AdaRound.")
@click.option("--iters", default=Settings.iters, show_default=True, help="Of these blocks.")
@click.option("--tiny", is_flag=True, help="A model of a few megabytes, to try the command.")
@click.option("--run", default="", help="What sets it apart from the model's other runs.")
@click.option("--note", default="", help="What else the machine did meanwhile, for the report.")
@click.option("--output", type=click.Path(path_type=Path), help="Of the report.")
def main(
    model: str,
    work: Path | None,
    seconds: float,
    pixels: tuple[int, ...],
    tiny: bool,
    run: str,
    note: str,
    output: Path | None,
    **settings: Any,
) -> None:
    """Run every stage at full size."""
    chosen = pixels or (TINY_PIXELS if tiny else Settings.pixels)
    with tempfile.TemporaryDirectory() as scratch:
        folder = emptied(work or Path(scratch))
        report = output or (folder if tiny else FOLDER)
        bench = Bench(Settings(model, pixels=chosen, **settings), tiny, folder, report, note, run)
        bench.run(seconds)
        rows = bench.data["rows"]
        done = sum(row["status"] == "done" for row in rows)
        stays = work is not None or report != folder
        click.echo(f"{done} of {len(rows)} stages done" + f"; report in {report}" * stays)
        if tiny:
            click.echo((report / f"{sd3_full_report.NAME}.md").read_text())
    sys.exit(done < len(rows))


if __name__ == "__main__":
    main()
