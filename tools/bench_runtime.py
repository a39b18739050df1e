"""What both tracks give nano together: fidelity, accuracy, Fréchet distance, pictures, seconds.

    python -m tools.bench_runtime --captions 256 --pictures 4096 --num-images 64 --stride 6

Every model is measured alike, against the 16-bit model and on captions that calibration never saw:

- teacher-forced: SQNR of the guided velocity on the 16-bit model's trajectories, mean over steps;
- accuracy: the share of pictures in which the scorer finds every attribute of the caption right;
- Fréchet distance of the scorer's features to those of the 16-bit model's pictures from other
  noise, so that the 16-bit model's own distance is the floor;
- latent SQNR and PSNR of the finished pictures, against the 16-bit model's from the same noise.

Intervals are 95% bootstrap over captions, of paired differences. Results that are not given by
--adaround-output, --quant-config and --quant-config-6 are made in --work. Writes
docs/benchmarks/runtime.json and runtime.md after every model; --only-time measures a step's seconds
instead and writes step_time.json and step_time.md.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from src.adaround_optimize import adaround_optimize
from src.analyze_activations import analyze_activations
from src.cache_adaround_data import cache_adaround_data
from src.collect_layer_activations import collect_layer_activations
from src.generate_calibration_data import generate_calibration_data
from src.inference.compare import seconds_a_step
from src.inference.ladder import largest_inputs, rungs_of
from src.inference.open import Settings, activations, open_artifacts
from src.metrics.fidelity import (
    Reference,
    bootstrap_interval,
    reference_trajectories,
    teacher_forced_sqnr,
)
from src.metrics.frechet import Gaussian
from src.metrics.psnr import psnr
from src.metrics.signal import sqnr_db
from src.models.load import NANO, load_pipeline
from src.models.nano.captions import parse
from src.models.nano.judge import judge
from src.models.nano.scorer import Scorer, load_scorer
from src.models.pipeline import Conditioning, Pipeline
from src.models.prompts import load_prompts
from src.quant.block_rounding import METHODS
from src.quant.inject import injected

import click
import mlx.core as mx
import numpy as np

from tools.bench_common import machine, write_report
from tools.evaluate_nano import wilson_interval

MODEL = "nano"
EXACT = "16-bit"
# Of the trajectories, of the pictures, and of the pictures that these are compared with.
TEACHER_SEED, PICTURE_SEED, OTHER_SEED = 10_000, 100_000, 500_000


@dataclass(frozen=True)
class Made:
    """The tracks' results: rounded weights, activations at 8 bits and at 6 on average."""

    weights_8: Path
    config_8: Path
    weights_6: Path
    config_6: Path


@dataclass(frozen=True)
class Candidate:
    """A model to measure; the context puts it into its pipeline."""

    name: str
    pipeline: Pipeline
    context: Any = nullcontext  # () to a context manager


@dataclass
class Drawn:
    """What is kept of one model's pictures."""

    right: np.ndarray  # (pictures,) whether all attributes are
    features: Gaussian
    latents: list[mx.array] = field(default_factory=list)  # of the first captions
    pictures: list[np.ndarray] = field(default_factory=list)


def make_tracks(work: Path, given: dict[str, Path | None], options: dict[str, Any]) -> Made:
    """Runs the stages for what is not given; a second run in the same folder goes on.

    Each config has weights of its own, which were rounded with its smoothing.
    """
    if all(given.values()):
        return Made(**given)
    images = options["num_images"]
    calibration = generate_calibration_data(MODEL, work / "calibration_data", num_images=images)
    cache = cache_adaround_data(calibration, num_images=images, stride=options["stride"])
    stats = collect_layer_activations(calibration, num_images=min(images, 16))
    analyze = partial(analyze_activations, stats, policy="error")
    made = {
        "config_8": given["config_8"] or analyze(stats, tiers=(8,)),
        "config_6": given["config_6"] or analyze(work / "average_6", average_bits=6.0),
    }
    for bits in ("8", "6"):
        made[f"weights_{bits}"] = given[f"weights_{bits}"] or adaround_optimize(
            cache,
            work / f"adaround_output_{bits}",
            method=options["method"],
            iters=options["iters"],
            batch_size=options["batch_size"],
            quant_config=made[f"config_{bits}"],
        )
    return Made(**made)


def candidates(made: Made) -> Iterator[Candidate]:
    """The 16-bit model, then every rung, then the noise floor of the other float type."""
    opened = open_artifacts(MODEL, made.weights_8, made.config_8, Settings())
    pipeline = opened.pipeline
    yield Candidate(EXACT, pipeline)
    largest = largest_inputs(made.config_8.parent, opened.config)
    if largest is None:
        click.echo("no statistics beside --quant-config: RTN with one scale is left out")
    rungs = list(rungs_of(opened, largest))
    six = open_artifacts(pipeline, made.weights_6, made.config_6, Settings())
    rungs.append((f"ours W{six.rounded.bits}{activations(six.config)} static", six.checked, {}))
    for name, checked, runtime in rungs:
        context = partial(injected, pipeline.transformer, checked, **runtime)
        yield Candidate(name, pipeline, context)
    other = mx.float16 if pipeline.dtype == mx.float32 else mx.float32
    name = f"floor: {str(other).removeprefix('mlx.core.')}, not quantized"
    yield Candidate(name, load_pipeline(MODEL, other))


class Bench:
    """The 16-bit model's answers, and how near a candidate comes to them."""

    def __init__(self, pipeline: Pipeline, captions: int, pictures: int, batch: int, stride: int):
        self.pipeline, self.captions, self.batch = pipeline, captions, batch
        self.texts = load_prompts(f"{pipeline.prompts}_evaluation")
        self.pictures = max(pictures, captions)
        self.scorer: Scorer = load_scorer(NANO / "scorer.safetensors")
        self.references = [
            reference_trajectories(
                pipeline,
                [self.texts[i % len(self.texts)] for i in rows],
                seed=TEACHER_SEED + rows.start,
                num_steps=pipeline.defaults.num_steps,
                stride=stride,
            )
            for rows in batches(captions, batch)
        ]
        click.echo(f"trajectories of {captions} captions are there")
        self.others = self.draw(pipeline, OTHER_SEED, keep=0).features
        click.echo(f"{self.pictures} pictures from other noise are there")
        self.exact: Drawn | None = None
        self.first_db: np.ndarray | None = None  # (captions,) of the first rung

    def teacher_forced(self, pipeline: Pipeline) -> np.ndarray:
        """(steps, captions) dB."""
        tables = [
            teacher_forced_sqnr(pipeline.transformer, in_dtype(reference, pipeline.dtype))
            for reference in self.references
        ]
        return np.concatenate(tables, axis=1)

    def draw(self, pipeline: Pipeline, first_seed: int, keep: int) -> Drawn:
        """Pictures of all captions in turn; of the first `keep` latents and pictures are kept."""
        drawn, right = Drawn(np.zeros(0), Gaussian()), []
        for rows in batches(self.pictures, self.batch):
            texts = [self.texts[i % len(self.texts)] for i in rows]
            latent = pipeline.sample(texts, [first_seed + i for i in rows])
            pictures = pipeline.decode(latent)
            shown = mx.array(pictures) / 255
            drawn.features.add(np.array(self.scorer.features(shown)))
            right.append(judge(self.scorer, shown, parse(texts))["all"])
            kept = max(0, keep - rows.start)
            drawn.latents += list(latent[:kept])
            drawn.pictures += list(pictures[:kept])
        drawn.right = np.concatenate(right)
        return drawn

    def measure(self, candidate: Candidate) -> dict[str, Any]:
        """All figures of one model."""
        start = time.perf_counter()
        with candidate.context():
            drawn = self.draw(candidate.pipeline, PICTURE_SEED, keep=self.captions)
            is_exact = self.exact is None
            table = None if is_exact else self.teacher_forced(candidate.pipeline)
        self.exact = drawn if is_exact else self.exact
        figures = {
            "accuracy": accuracy(drawn.right, self.exact.right),
            "frechet": drawn.features.distance(self.others) if self.pictures > 1 else None,
        }
        if table is not None:
            figures |= self.velocity(table) | self.finished(drawn)
        return figures | {"seconds": time.perf_counter() - start}

    def velocity(self, table: np.ndarray) -> dict[str, Any]:
        """Of a (steps, captions) table; the gain is over the first rung."""
        values = table.mean(axis=0)
        self.first_db = values if self.first_db is None else self.first_db
        gain = values - self.first_db
        return {
            "db": float(values.mean()),
            "interval": bootstrap_interval(values),
            "gain": float(gain.mean()),
            "gain_interval": bootstrap_interval(gain),
            "by_step": table.mean(axis=1).tolist(),
            "by_caption": values.tolist(),
        }

    def finished(self, drawn: Drawn) -> dict[str, Any]:
        """Median and worst of the finished latents and pictures, against the 16-bit model's."""
        pairs = zip(self.exact.latents, drawn.latents, strict=True)
        latents = [sqnr_db(*pair) for pair in pairs]
        pairs = zip(self.exact.pictures, drawn.pictures, strict=True)
        pictures = [psnr(*pair) for pair in pairs]
        named = {"latent": latents, "psnr": pictures}
        return {
            name: {"median": float(np.median(values)), "worst": float(np.min(values))}
            for name, values in named.items()
        }


def batches(count: int, size: int) -> list[range]:
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def in_dtype(reference: Reference, dtype: mx.Dtype) -> Reference:
    """The same trajectories for a model that computes in that type, which its text decides."""
    text, pooled = reference.conditioning.text, reference.conditioning.pooled
    return replace(reference, conditioning=Conditioning(text.astype(dtype), pooled.astype(dtype)))


def accuracy(right: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """Share with its interval, and the paired difference from the 16-bit model's."""
    difference = right.astype(float) - exact
    return {
        "share": float(right.mean()),
        "interval": wilson_interval(int(right.sum()), len(right)),
        "difference": float(difference.mean()),
        "difference_interval": bootstrap_interval(difference),
    }


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    share = row["accuracy"]
    cells = [name, *(["", "", "", ""] if "db" not in row else velocity_cells(row))]
    low, high = (100 * bound for bound in share["difference_interval"])
    cells.insert(3, f"{100 * share['share']:.2f}")
    cells.insert(4, f"{100 * share['difference']:+.2f} ({low:+.2f} to {high:+.2f})")
    cells.insert(5, "" if row["frechet"] is None else f"{row['frechet']:.4f}")
    return f"| {' | '.join(cells)} |"


def velocity_cells(row: dict[str, Any]) -> list[str]:
    low, high = row["interval"]
    gain = "{:+.2f} ({:+.2f} to {:+.2f})".format(row["gain"], *row["gain_interval"])
    ends = [f"{row[name]['median']:.1f}, {row[name]['worst']:.1f}" for name in ("latent", "psnr")]
    return [f"{row['db']:.2f} ({low:.2f} to {high:.2f})", gain, *ends]


HEAD = [
    "| model | velocity, dB | gain over the first rung, dB | all right, % | less the 16-bit "
    "model's, points | Fréchet distance | latent SQNR, median and worst, dB | PSNR, median and "
    "worst, dB |",
    "|---|---|---|---|---|---|---|---|",
]


def comparisons(rows: dict[str, dict]) -> list[str]:
    """Paired differences of ours in dB: what quantized activations cost."""
    ours = {name: np.array(r["by_caption"]) for name, r in rows.items() if name.startswith("ours")}
    if len(ours) < 2:
        return []
    (first, base), *others = ours.items()
    lines = []
    for name, values in others:
        low, high = bootstrap_interval(values - base)
        mean = (values - base).mean()
        lines.append(f"- {name} less {first}: {mean:+.2f} dB ({low:+.2f} to {high:+.2f})")
    return lines


def write(rows: dict[str, dict], bench: Bench, options: dict[str, Any]) -> None:
    data = {
        "machine": machine(),
        "captions": bench.captions,
        "pictures": bench.pictures,
        "tracks": {k: options[k] for k in ("method", "iters", "num_images", "stride")},
        "models": rows,
    }
    lines = [
        f"Against {bench.pipeline.name} at 16 bits ({str(bench.pipeline.dtype)[9:]}). Velocity, "
        f"latents and PSNR: {bench.captions} captions that calibration never saw; accuracy and "
        f"Fréchet distance (scorer features, to the 16-bit model's pictures from other noise): "
        f"{bench.pictures} pictures. 95% bootstrap intervals.",
        "",
        *HEAD,
        *(line(name, row) for name, row in rows.items()),
    ]
    if differences := comparisons(rows):
        lines += ["", "Velocity, paired over captions:", "", *differences]
    write_report("runtime", "nano with both tracks", data, lines)


def step_times(made: Made, rounds: int) -> dict[str, dict]:
    """Seconds of a step of one picture with guidance, both models in turn."""
    chosen = {
        "W4A8 static": Settings(),
        "W4A8 per token": Settings(a_scale="token"),
        "W4A16": Settings(weights_only=True),
    }
    rows = {}
    for name, settings in chosen.items():
        opened = open_artifacts(MODEL, made.weights_8, made.config_8, settings)
        caption = load_prompts(f"{opened.pipeline.prompts}_evaluation")[:1]
        steps = opened.pipeline.defaults.num_steps
        reference = reference_trajectories(opened.pipeline, caption, num_steps=steps, stride=steps)
        quantized = opened.inject(keep=True)
        found = [list(seconds_a_step(quantized, reference).values()) for _ in range(rounds)]
        exact, own = np.median(found, axis=0)
        ratio = float(np.median([b / a for a, b in found]))
        rows[name] = {"exact_s": float(exact), "own_s": float(own), "ratio": ratio}
        click.echo(f"{name}: {own:.4f} s, 16-bit {exact:.4f} s, ratio {ratio:.3f}")
    return rows


def write_times(rows: dict[str, dict], rounds: int) -> None:
    lines = [
        f"A step of one picture of nano with guidance: medians of {rounds} measurements, of some "
        "rounds each, in which both models run one after the other.",
        "",
        "| | 16-bit model, s | quantized, s | ratio |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['exact_s']:.4f} | {row['own_s']:.4f} | {row['ratio']:.2f} |")
    data = {"machine": machine(), "models": rows}
    write_report("step_time", "Seconds of a quantized step", data, lines)


def work_folder(given: Path | None) -> AbstractContextManager[str | Path]:
    return tempfile.TemporaryDirectory() if given is None else nullcontext(given)


@click.command()
@click.option("--adaround-output", type=Path, help="Rounded weights.  [default: made in --work]")
@click.option("--adaround-output-6", type=Path, help="With the 6 bits' smoothing.  [default: made]")
@click.option("--quant-config", type=Path, help="Activations at 8 bits.  [default: made]")
@click.option("--quant-config-6", type=Path, help="At 6 bits on average.  [default: made]")
@click.option("--work", type=Path, help="Folder for what is made.  [default: a temporary one]")
@click.option("--captions", default=256, show_default=True, help="Of trajectories, PSNR.")
@click.option("--pictures", default=4096, show_default=True, help="For accuracy, Fréchet.")
@click.option("--batch", default=256, show_default=True, help="Pictures at a time.")
@click.option("--eval-stride", default=1, show_default=True, help="Every how many steps.")
@click.option("--method", default="adaround", show_default=True, help=", ".join(METHODS))
@click.option("--iters", default=1000, show_default=True, help="Of learned rounding.")
@click.option("--batch-size", default=8, show_default=True, help="Of learned rounding.")
@click.option("--num-images", default=64, show_default=True, help="To calibrate with.")
@click.option("--stride", default=3, show_default=True, help="Of the cached steps.")
@click.option("--only-time", is_flag=True, help="Measure the seconds of a step instead.")
@click.option("--rounds", default=5, show_default=True, help="Of --only-time.")
def main(
    adaround_output: Path | None,
    adaround_output_6: Path | None,
    quant_config: Path | None,
    quant_config_6: Path | None,
    work: Path | None,
    only_time: bool,
    rounds: int,
    **options: Any,
) -> None:
    """Measure both tracks' results on nano."""
    given = {
        "weights_8": adaround_output,
        "config_8": quant_config,
        "weights_6": adaround_output_6,
        "config_6": quant_config_6,
    }
    with work_folder(work) as folder:
        made = make_tracks(Path(folder), given, options)
        if only_time:
            write_times(step_times(made, rounds), rounds)
            return
        rows: dict[str, dict] = {}
        bench: Bench | None = None
        for candidate in candidates(made):
            if bench is None:
                sizes = (options[name] for name in ("captions", "pictures", "batch", "eval_stride"))
                bench = Bench(candidate.pipeline, *sizes)
            rows[candidate.name] = bench.measure(candidate)
            click.echo(line(candidate.name, rows[candidate.name]))
            write(rows, bench, options)


if __name__ == "__main__":
    main()
