"""Changes instead of values: what MoDiff gives to nano at few bits, and what it costs.

    python -m tools.bench_modiff --num-pictures 2000 --steps 30 --work modiff_work

Every row draws the same captions from the same noise with nano's weights at 16, 8 or 4 bits and
its inputs at 16, 8, 6, 4 or 3 bits: plain, or modulated; with static scales or dynamic ones (of
each picture). Captions are those of scenes that are rendered too:

- latent SQNR of the finished pictures against full precision's of the same noise, in dB; and
  against those of the row's own weights with inputs in floats;
- FID and sFID of the scorer's features to the rendered scenes, Inception Score;
- Fréchet distance to full precision's pictures from other noise, whose floor is the row "other
  noise".

Rows are drawn in --work by `src.sample`, one folder each: a killed run goes on with the batch it
was at, --rows draws some of them (several machines can share the work), and under mlx.launch each
rank draws every nth batch. What is finished is written to docs/benchmarks/modiff.json and
modiff.md, after every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.adaround_optimize import adaround_optimize
from src.analyze_activations import analyze_activations
from src.cache_adaround_data import cache_adaround_data
from src.collect_layer_activations import collect_layer_activations
from src.distributed import Ranks
from src.evaluation.networks import ScorerNetwork
from src.evaluation.statistics import Statistics, load_statistics
from src.generate_calibration_data import generate_calibration_data
from src.inference.residual_options import Inputs
from src.inference.residuals import Work, cache_bytes
from src.mass_sampling.work import STATISTICS, gather, kept_latents
from src.metrics.fidelity import bootstrap_interval
from src.metrics.signal import decibel
from src.models.load import load_pipeline
from src.models.nano.captions import captions
from src.models.nano.render import render
from src.models.nano.scenes import SceneBatch, sample_scenes
from src.quant.block_rounding import METHODS
from src.sample import sample
from src.store import MANIFEST_NAME, write_bytes

import click
import mlx.core as mx
import numpy as np

from tools.bench_common import machine, write_report
from tools.modiff_rows import (
    EXACT,
    HEAD,
    OTHER_SEED,
    PICTURE_SEED,
    SIXTEEN,
    STATIC,
    Row,
    all_rows,
    auto_line,
    chosen_rows,
    goals,
    line,
)

MODEL, SCENE_SEED = "nano", 50
CHUNK = 256  # pictures at once for renderer and scorer
KEPT_LATENTS = 1024
KEPT = ("dtype", "scale_pictures", "method", "iters", "num_images")  # settings, in the JSON
QUARTER = 0.25  # of the whole cache, for the rows that choose layers


@dataclass(frozen=True)
class Bench:
    """The folder of work, and the order that all rows share."""

    work: Path
    num_pictures: int
    steps: int
    batch: int
    tracks: dict[str, Any]

    @property
    def rows(self) -> Path:
        return self.work / f"rows_{self.num_pictures}_{self.steps}"

    @property
    def prompts(self) -> Path:
        return self.work / f"captions_{self.num_pictures}.txt"

    @property
    def latents(self) -> int:
        return min(self.num_pictures, KEPT_LATENTS)

    @property
    def batches(self) -> list[range]:
        count, size = self.num_pictures, min(self.batch, self.num_pictures)
        return [range(i, min(i + size, count)) for i in range(0, count, size)]

    def scenes(self) -> SceneBatch:
        return sample_scenes(np.random.default_rng(SCENE_SEED), self.num_pictures)

    def draw(self, row: Row) -> None:
        """One row's features and first latents; goes on where it was stopped."""
        weights, config = (None, "none")
        if row.weight_bit != SIXTEEN:
            weights, config = self.weights(row.weight_bit), self.config()
        memory = None
        if row.modulate == "auto":
            memory = QUARTER * self.whole_cache() / 1e9
        scale = STATIC if row.act_bit == SIXTEEN else row.scale
        sample(
            self.rows / row.folder,
            model=MODEL,
            adaround_output=weights or "",
            quant_config=config,
            weight_bit=row.weight_bit,
            inputs=Inputs(row.act_bit, row.modulate, memory, scale, self.tracks["scale_pictures"]),
            timesteps=self.steps,
            num_samples=self.num_pictures,
            prompts=str(self.prompts),
            seed=row.seed,
            batch_size=self.batch,
            keep="features",
            keep_latents=self.latents,
            dtype=self.tracks["dtype"],
        )

    def whole_cache(self) -> int:
        """Bytes that all layers would keep for a batch."""
        pipeline = load_pipeline(MODEL)
        weight, size = pipeline.defaults.cfg_weight, min(self.batch, self.num_pictures)
        return sum(cache_bytes(pipeline, Work.of(pipeline, self.steps, weight, size)).values())

    def config(self) -> Path:
        """The activation track's, 8 bits; its smoothing is rounded into the weights."""
        if self.tracks["quant_config"] is not None:
            return self.tracks["quant_config"]
        path = self.calibration / "activations" / "quant_config.json"
        if not path.exists():
            stats = together(collect_layer_activations(self.calibration, num_images=16))
            if Ranks.here().rank == 0:
                analyze_activations(stats, policy="error", tiers=(8,))
        return together(path)

    @property
    def calibration(self) -> Path:
        images = self.tracks["num_images"]
        folder = self.work / "calibration"
        return together(generate_calibration_data(MODEL, folder, num_images=images))

    def weights(self, bits: int) -> Path:
        """The weight track's result."""
        if self.tracks[f"adaround_output_{bits}"] is not None:
            return self.tracks[f"adaround_output_{bits}"]
        folder = self.work / f"adaround_output_{bits}"
        if not (folder / MANIFEST_NAME).exists():
            images = self.tracks["num_images"]
            adaround_optimize(
                together(cache_adaround_data(self.calibration, num_images=images, stride=3)),
                folder,
                bits_w=bits,
                method=self.tracks["method"],
                iters=self.tracks["iters"],
                quant_config=self.config(),
            )
        return together(folder)

    def render_truth(self, eyes: ScorerNetwork) -> Path:
        """Statistics of the rendered scenes of all captions."""
        path = self.work / f"rendered_{self.num_pictures}.npz"
        if path.exists():
            return path
        statistics, scenes = Statistics(eyes.identity), self.scenes()
        for start in range(0, self.num_pictures, CHUNK):
            shown = mx.clip(render(scenes[start : start + CHUNK]), 0, 1)
            pictures = np.array(mx.round(shown * 255).astype(mx.uint8))
            names = [str(start + i) for i in range(len(pictures))]
            statistics.add(eyes(pictures), names)
        return statistics.save(path)

    def finished(self) -> list[Row]:
        return [r for r in all_rows() if (self.rows / r.folder / MANIFEST_NAME).exists()]

    def figures(self, eyes: ScorerNetwork) -> dict[str, dict[str, Any]]:
        """Of every finished row, by name."""
        found = self.finished()
        latents = {row.name: kept_latents(self.rows / row.folder, self.batches) for row in found}
        return {row.name: self.row_figures(row, latents, eyes) for row in found}

    def row_figures(
        self, row: Row, latents: dict[str, np.ndarray], eyes: ScorerNetwork
    ) -> dict[str, Any]:
        folder, own = self.rows / row.folder, latents[row.name]
        statistics = gather(folder, eyes, self.batches)
        figures: dict[str, Any] = {}
        for key, name in (("latent", EXACT), ("latent_own_weights", row.own_floats)):
            paired = row.seed == PICTURE_SEED and name != row.name and name in latents
            figures[key] = latent_figures(latents[name], own) if paired else None
        if self.num_pictures > max(eyes.identity.pooled, eyes.identity.spatial):
            known, score = statistics.known, statistics.score
            figures["inception_score"] = [score.mean, score.deviation]
            truth = load_statistics(self.render_truth(eyes), eyes.identity)
            figures["fid"] = known.pooled.distance(truth.pooled)
            figures["sfid"] = known.spatial.distance(truth.spatial)
            other = self.rows / Row(seed=OTHER_SEED).folder / STATISTICS
            if other.exists() and row.seed == PICTURE_SEED:
                to = load_statistics(other, eyes.identity)
                figures["to_full_precision"] = known.pooled.distance(to.pooled)
        return figures


def together(path: Path) -> Path:
    """What ranks make together, once the last of them is done with it."""
    Ranks.here().barrier()
    return path


def latent_figures(wanted: np.ndarray, got: np.ndarray) -> dict[str, Any]:
    """dB of each picture's finished latent."""
    axes = (1, 2, 3)
    signal = np.square(wanted, dtype=np.float64).sum(axis=axes)
    error = np.square(np.subtract(wanted, got, dtype=np.float64)).sum(axis=axes)
    values = np.array([decibel(s, e) for s, e in zip(signal, error, strict=True)])
    return {
        "mean": float(values.mean()),
        "interval": bootstrap_interval(values),
        "median": float(np.median(values)),
        "worst": float(values.min()),
        "pooled": decibel(float(signal.sum()), float(error.sum())),
    }


def report(bench: Bench, rows: dict[str, dict[str, Any]]) -> None:
    judged = [goal.judged(rows) for goal in goals()] + [auto_line(rows, bits) for bits in (8, 4)]
    lines = [
        f"nano, {bench.num_pictures} pictures a row, {bench.steps} steps, guidance 4, each row the "
        f"same captions and noise; dB over the first {bench.latents}. Dynamic scales are those of "
        "each picture. FID and sFID are to the rendered scenes of the same captions; the last "
        "column is the Fréchet distance to full precision's pictures from other noise.",
        "",
        *HEAD,
        *(line(name, row) for name, row in rows.items()),
        "",
        "What was to be reached (dB of A8, A4 and auto against the same weights with inputs in "
        "floats):",
        "",
        *(text for text in judged if text is not None),
    ]
    data = {
        "machine": machine(),
        "pictures": bench.num_pictures,
        "steps": bench.steps,
        "batch": bench.batch,
        "tracks": {k: v for k, v in bench.tracks.items() if k in KEPT},
        "rows": rows,
    }
    write_report("modiff", "MoDiff on nano", data, lines)


@click.command()
@click.option("--work", type=Path, default=Path("modiff_work"), show_default=True, help="Folder.")
@click.option("--num-pictures", default=2000, show_default=True, help="A row.")
@click.option("--steps", default=100, show_default=True, help="Of sampling.")
@click.option("--batch", default=256, show_default=True, help="Pictures at once.")
@click.option("--rows", help="Parts of rows' names, separated by semicolons.  [default: all]")
@click.option("--adaround-output-8", type=Path, help="Weights of 8 bits.  [made in --work]")
@click.option("--adaround-output-4", type=Path, help="Weights of 4 bits.  [made in --work]")
@click.option("--quant-config", type=Path, help="That they were rounded with.  [made in --work]")
@click.option("--scale-pictures", default=8, show_default=True, help="For static scales.")
@click.option("--dtype", help="float16 or float32.  [default: the device's]")
@click.option("--method", default="adaround", show_default=True, help=", ".join(METHODS))
@click.option("--iters", default=1000, show_default=True, help="Of learned rounding.")
@click.option("--num-images", default=16, show_default=True, help="To calibrate with.")
def main(
    work: Path, num_pictures: int, steps: int, batch: int, rows: str | None, **tracks: Any
) -> None:
    """Measure MoDiff on nano."""
    bench, eyes, ranks = (
        Bench(work, num_pictures, steps, batch, tracks),
        ScorerNetwork(),
        Ranks.here(),
    )
    chosen = chosen_rows(rows)
    if ranks.rank == 0:
        work.mkdir(parents=True, exist_ok=True)
        write_bytes(bench.prompts, "\n".join(captions(bench.scenes())).encode() + b"\n")
        if num_pictures > max(eyes.identity.pooled, eyes.identity.spatial):
            bench.render_truth(eyes)
    ranks.barrier()
    for bits in sorted({row.weight_bit for row in chosen} - {SIXTEEN}):
        bench.weights(bits)  # on all ranks: the stages split their work
    for row in chosen:
        bench.draw(row)
        ranks.barrier()
        if ranks.rank == 0:
            figures = bench.figures(eyes)
            click.echo(line(row.name, figures[row.name]))
            report(bench, figures)


if __name__ == "__main__":
    main()
