"""Very many pictures over several GPUs: the user's command on one rank, on two, on four.

    python -m tools.bench_ranks
    python -m tools.bench_ranks --adaround-output adaround_output --quant-config quant_config.json

`python -m src.sample` draws the same pictures once for each --ranks, each time in a new folder: one
rank as it is, several through mlx.launch, which gives each rank a GPU of its own. Weights have 16
bits, or those of the artifacts. What each command takes as a whole is measured, and the pictures a
second once all ranks run; and whether all folders hold the same bytes. More ranks than GPUs are
left out where there is CUDA; elsewhere they share what there is. Writes docs/benchmarks/ranks.json,
ranks.md and ranks.png after each run.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.backends.device import Device
from src.benchmarking.plots import COLOURS
from src.cli import command
from src.errors import UserError
from src.mass_sampling.plan import DEFAULT_MODEL, KEEPS
from src.mass_sampling.work import FORMAT, VERSION
from src.report.plots import plain_style, save
from src.store import MANIFEST_NAME, read_manifest

import click
import mlx.core as mx
from matplotlib.figure import Figure

from tools import bench_common
from tools.bench_common import environment, machine, write_report

LAUNCHER = "mlx.launch"
NAME, TITLE = "ranks", "The same pictures on one GPU and on several"
GOAL_RANKS, GOAL = 4, 3.7
LOG_LINES = 25  # of a command that failed
CURVES = {  # of a row: label and colour
    "times_running": ("pictures/s while running", "quantized"),
    "times_whole": ("whole command, start included", "modulated"),
}


@dataclass(frozen=True)
class Job:
    """What every run draws; without artifacts the model's own 16-bit weights do."""

    model: str
    num_samples: int
    timesteps: int
    batch_size: int
    keep: str
    adaround_output: str | None = None
    quant_config: str | None = None

    def __post_init__(self) -> None:
        if (self.adaround_output is None) != (self.quant_config is None):
            raise UserError("--adaround-output and --quant-config belong together; give both")

    def check(self, ranks: Sequence[int]) -> None:
        """Raises unless each rank has as many whole batches as the others, and one to count."""
        if 1 not in ranks or min(ranks) < 1:
            raise UserError(
                f"--ranks {sorted(ranks)} must have 1, which the others are held against"
            )
        for count in ranks:
            one_each = self.batch_size * count
            if self.num_samples % one_each or self.num_samples < 2 * one_each:
                raise UserError(
                    f"--num-samples {self.num_samples} must be {one_each} times 2 or more, a whole "
                    f"number, for batches of {self.batch_size} on {count} ranks"
                )

    def words(self, output: str, ranks: int, backend: str | None, pictures: int) -> list[str]:
        """The command as a user types it."""
        launch = [LAUNCHER, "-n", str(ranks), *(["--backend", backend] if backend else []), "--"]
        weights = ["--weight-bit", "16"]
        if self.adaround_output is not None and self.quant_config is not None:
            weights = ["--adaround-output", self.adaround_output]
            weights += ["--quant-config", self.quant_config]
        return [
            *(launch if ranks > 1 else []),
            *("python", "-m", "src.sample", "--model", self.model, *weights),
            *("--num-samples", str(pictures), "--timesteps", str(self.timesteps)),
            *("--batch-size", str(self.batch_size), "--keep", self.keep, "--output-dir", output),
        ]


def launcher() -> list[str]:
    """MLX's launcher of this Python, also where its script is not installed beside it."""
    script = Path(sys.executable).parent / LAUNCHER
    if script.exists():
        return [str(script)]
    return [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"]


def run_words(words: Sequence[str], log: Path, limit: float | None) -> float:
    """Seconds of the command; after `limit` it is killed with all that it has started."""
    runnable = {LAUNCHER: launcher(), "python": [sys.executable]}
    whole = [part for word in words for part in runnable.get(word, [word])]
    start = time.perf_counter()
    # At an end of file on its input the launcher would never sleep, so it gets a silent pipe.
    with (
        open(log, "wb") as file,
        subprocess.Popen(
            whole, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, env=environment(),
            start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            process.wait(limit)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return time.perf_counter() - start


def batch_ends(
    folder: Path, units: Mapping[str, Mapping[str, Any]], ranks: int
) -> list[list[float]]:
    """When each rank's batches ended, in seconds of the clock of files; the stage deals them out
    in turn."""
    batches = sorted((unit for unit in units if unit.isdigit()), key=int)
    ends = [max((folder / n).stat().st_mtime for n in units[unit]["files"]) for unit in batches]
    return [ends[rank::ranks] for rank in range(ranks)]


def running_seconds(ends: Sequence[Sequence[float]]) -> float:
    """The longest of the ranks' times from the end of its own first batch to that of its last."""
    return max(max(own) - min(own) for own in ends)


def running_rate(ends: Sequence[Sequence[float]], batch_size: int) -> float:
    """Pictures a second, by when each rank's batches ended, in seconds.

    A rank's clock starts when its own first batch ends, so no rank's start counts; the pictures
    after the first batches are shared out over the longest clock, so the slowest rank counts.
    """
    return batch_size * sum(len(own) - 1 for own in ends) / running_seconds(ends)


def hashes_of(units: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The sha256 of every file by its name."""
    return {
        name: told["sha256"] for record in units.values() for name, told in record["files"].items()
    }


@dataclass
class Bench:
    """The runs so far, and what the later ones are held against."""

    job: Job
    folder: Path
    deadline: float | None  # of time.monotonic
    gpus: int
    cuda: bool

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.about: dict[str, Any] = {}
        self.first_hashes: dict[str, str] = {}

    def words(self, output: str, ranks: int, pictures: int | None = None) -> list[str]:
        backend = "nccl" if self.cuda else None
        return self.job.words(output, ranks, backend, pictures or self.job.num_samples)

    def limit(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def warm_up(self) -> None:
        """One batch, so that no run finds fewer compiled kernels on disk than another."""
        name = "warm_up"
        words = self.words(str(self.folder / name), 1, self.job.batch_size)
        with suppress(subprocess.TimeoutExpired):  # which leaves out all runs as well
            self.finished(words, self.folder / name)

    def measure(self, ranks: int) -> None:
        """Appends a row; one that is left out says why."""
        name = f"{NAME}_{ranks}"
        row: dict[str, Any] = {"ranks": ranks, "command": shlex.join(self.words(name, ranks))}
        self.rows.append(row)
        if self.cuda and ranks > self.gpus:
            row["left_out"] = gpus_here(self.gpus)
            return
        folder, began = self.folder / name, time.time()
        try:
            row["seconds"] = self.finished(self.words(str(folder), ranks), folder)
        except subprocess.TimeoutExpired:
            row["left_out"] = "out of --seconds"
            return
        manifest = read_manifest(folder, FORMAT, VERSION, verify=True)
        ends = batch_ends(folder, manifest["units"], ranks)
        row["first_batch_seconds"] = [min(own) - began for own in ends]
        row["running_seconds"] = running_seconds(ends)
        row["pictures_per_second"] = running_rate(ends, self.job.batch_size)
        self.compare(row, manifest)

    def compare(self, row: dict[str, Any], manifest: Mapping[str, Any]) -> None:
        """With the first run: its times, and its files byte by byte."""
        hashes, first = hashes_of(manifest["units"]), self.rows[0]
        if row is first:
            self.first_hashes = hashes
            self.about = {key: manifest["settings"][key] for key in ("weight_bit", "dtype")}
        names = hashes.keys() | self.first_hashes.keys()
        row["files"] = len(hashes)
        row["files_that_differ"] = sum(hashes.get(n) != self.first_hashes.get(n) for n in names)
        row["times_whole"] = first["seconds"] / row["seconds"]
        row["times_running"] = row["pictures_per_second"] / first["pictures_per_second"]

    def finished(self, words: Sequence[str], folder: Path) -> float:
        """Seconds. The launcher exits with 0 whatever becomes of its ranks: the manifest tells."""
        log = folder.with_suffix(".log")
        seconds = run_words(words, log, self.limit())
        if not (folder / MANIFEST_NAME).exists():
            lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
            click.echo("\n".join(lines[-LOG_LINES:]), err=True)
            raise UserError(f"`{shlex.join(words)}` did not finish; see its last lines above")
        return seconds

    def report(self) -> list[str]:
        """Writes what there is, and gives the text."""
        data = {
            "machine": machine(),
            "gpus": self.gpus,
            "cuda": self.cuda,
            "job": {**vars(self.job), **self.about},
            "goal": goal(self.rows, self.gpus),
            "rows": self.rows,
        }
        lines = [*about_lines(data), "", *table(self.rows), "", data["goal"]]
        lines += ["", f"![Times one rank]({NAME}.png)"]
        plot(data, bench_common.FOLDER / f"{NAME}.png")
        write_report(NAME, TITLE, data, lines)
        return lines


def gpus_here(gpus: int) -> str:
    return f"{gpus or 'no'} GPU{'s' if gpus > 1 else ''} here"


def goal(rows: Sequence[Mapping[str, Any]], gpus: int) -> str:
    """What became of the wanted rate."""
    wanted = f"At least {GOAL} times the pictures a second of one rank with {GOAL_RANKS}"
    found = [r["times_running"] for r in rows if r["ranks"] == GOAL_RANKS and "times_running" in r]
    if not found or gpus < GOAL_RANKS:
        return f"{wanted}: not measured ({gpus_here(gpus)})."
    return f"{wanted}: {found[0]:.2f}, {'met' if found[0] >= GOAL else 'missed'}."


def about_lines(data: Mapping[str, Any]) -> list[str]:
    job = data["job"]
    weights = f"weights of {job['weight_bit']} bits" if "weight_bit" in job else "its weights"
    inputs = "" if job["quant_config"] is None else ", inputs as the quant config has them"
    return [
        f"{job['num_samples']} pictures of {job['model']}, {job['timesteps']} steps with guidance, "
        f"batches of {job['batch_size']}, {weights}{inputs}, `--keep {job['keep']}`; "
        + ("one GPU a rank." if data["cuda"] else "all ranks share what there is."),
        "",
        "Whole: the command from its start to its end, with Python's start, compiling and the last",
        "gathering of statistics. Running: each rank's clock starts when its own first batch ends;",
        "the pictures of all later batches, over the longest of these clocks: no rank's start-up",
        "counts, and the slowest rank's end does. One batch is drawn before all of it, so that no",
        "run finds fewer compiled kernels on disk than another.",
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| ranks | whole, s | times one rank | first batches after, s | running, pictures/s "
        "| times one rank | the same bytes |",
        "|---:" * 6 + "|---|",
    ]
    for row in rows:
        if "seconds" not in row:
            lines.append(f"| {row['ranks']} | not measured: {row['left_out']} | | | | | |")
            continue
        first, differ = row["first_batch_seconds"], row["files_that_differ"]
        span = " to ".join(dict.fromkeys(f"{end:.1f}" for end in (min(first), max(first))))
        same = f"no: {differ} of {row['files']} files" if differ else f"yes, {row['files']} files"
        lines.append(
            f"| {row['ranks']} | {row['seconds']:.1f} | {row['times_whole']:.2f} | {span} "
            f"| {row['pictures_per_second']:.4g} | {row['times_running']:.2f} "
            f"| {same} |"
        )
    return lines


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Times one rank over the number of ranks: running, as a whole, and at best."""
    rows = [row for row in data["rows"] if "times_running" in row]
    counts = [row["ranks"] for row in rows]
    most = max(counts, default=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with plain_style():
        figure = Figure(figsize=(5.5, 4.0), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(counts, counts, "--", color="black", linewidth=0.8, label="as many as ranks")
        for kind, (label, colour) in CURVES.items():
            times = [row[kind] for row in rows]
            axes.plot(counts, times, "o-", color=COLOURS[colour], label=label)
        axes.set_xticks(counts)
        axes.set_xlim(0.7, most + 0.3)
        axes.set_ylim(0, 1.15 * most)
        axes.spines.right.set_visible(False)
        axes.set_xlabel("ranks")
        axes.set_ylabel("times one rank")
        axes.legend(loc="upper left", fontsize=8, frameon=False)
        axes.set_title(f"{data['job']['model']} on {data['machine']['device']}", fontsize=10)
        save(figure, path)


@command()
@click.option("--ranks", multiple=True, type=int, default=(1, 2, 4), help="Numbers of ranks.")
@click.option("--model", default=DEFAULT_MODEL, help="Its name or folder.")
@click.option("--num-samples", default=20480, help="Pictures, the same for every run.")
@click.option("--timesteps", default=28, help="Sampling steps.")
@click.option("--batch-size", default=256, help="Pictures at once, on each rank.")
@click.option("--keep", type=click.Choice(KEEPS), default="features", help="What is kept.")
@click.option("--adaround-output", help="The weight track's folder.  [weights of 16 bits]")
@click.option("--quant-config", help="The activation track's file, with --adaround-output.")
@click.option("--work", help="Folder for the files.  [a temporary one]")
@click.option("--seconds", type=float, help="After so many a run is ended and left out.  [never]")
@click.option("--dry-run", is_flag=True, help="Print the commands and run none.")
def main(
    ranks: tuple[int, ...], work: str | None, seconds: float | None, dry_run: bool, **wanted: Any
) -> None:
    """Measure very many pictures on several ranks.

    \b
    Example:
      python -m tools.bench_ranks --ranks 1 --ranks 2
    """
    job, counts = Job(**wanted), sorted(set(ranks))
    job.check(counts)
    deadline = None if seconds is None else time.monotonic() + seconds
    cuda = Device.here().kind == "cuda"
    with tempfile.TemporaryDirectory(dir=work) as folder:
        bench = Bench(job, Path(folder), deadline, mx.device_count(mx.gpu), cuda)
        if dry_run:
            for count in counts:
                click.echo(shlex.join(bench.words(f"{NAME}_{count}", count)))
            return
        bench.warm_up()
        for count in counts:
            bench.measure(count)
            lines = bench.report()
            click.echo(table(bench.rows)[-1])
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
