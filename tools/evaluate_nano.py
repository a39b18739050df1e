"""How often nano draws what its caption says: `python -m tools.evaluate_nano --weights FOLDER`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from src.cli import command
from src.errors import UserError
from src.models.load import default_dtype, load_pipeline
from src.models.nano.captions import captions, tokenize
from src.models.nano.codec import Codec
from src.models.nano.judge import judge
from src.models.nano.render import render
from src.models.nano.scenes import SceneBatch, concatenate, sample_scenes
from src.models.nano.scorer import Scorer, load_scorer
from src.models.pipeline import Pipeline
from src.report.sheet import contact_sheet
from src.store import hash_file, write_bytes

import click
import mlx.core as mx
import numpy as np

from tools.nano_common import (
    is_held_out,
    picture_psnr,
    psnr_summary,
    write_report,
)

OBJECTS = (1, 2, 3)
PAIRS = ("seen", "unseen")
FIRST_SEED = 2**31  # of the noise; seeds that people type are smaller
MAX_ATTEMPTS = 200
SHEET = 32
Z = 1.959964  # of a two-sided interval of 95 %

Verdict = dict[str, np.ndarray]
Source = Callable[[list[str], int], np.ndarray]


@dataclass(frozen=True)
class Kind:
    """Captions of one number of objects, with pairs of shape and colour seen in training or not."""

    objects: int
    pairs: str

    def __str__(self) -> str:
        plural = "s" if self.objects > 1 else ""
        return f"{self.objects} object{plural}, {self.pairs} pairs"


@dataclass(frozen=True)
class Result:
    """One kind's pictures and what the scorer says of them, of the truth and of the codec's."""

    kind: Kind
    prompts: list[str]
    pictures: np.ndarray
    generated: Verdict
    rendered: Verdict
    coded: Verdict
    psnr: np.ndarray


def evaluation_scenes(kind: Kind, seed: int, n: int) -> SceneBatch:
    """`n` scenes of distinct captions that no training saw.

    Captions of unseen pairs never occur in training; of the others, those that are held out.
    """
    rng = np.random.default_rng([seed, 5, kind.objects, PAIRS.index(kind.pairs)])
    chosen: dict[str, SceneBatch] = {}
    for _ in range(MAX_ATTEMPTS):
        scenes = sample_scenes(rng, 4 * n + 64, counts=(kind.objects,), pairs=kind.pairs)
        texts = captions(scenes)
        fresh = is_held_out(tokenize(texts)) | (kind.pairs == "unseen")
        for index in np.flatnonzero(fresh):
            chosen.setdefault(texts[index], scenes[[index]])
        if len(chosen) >= n:
            return concatenate(list(chosen.values())[:n])
    raise UserError(f"{kind}: only {len(chosen)} distinct captions; lower --per-kind from {n}")


def picture_source(pipeline: Pipeline, first_seed: int, steps: int, cfg_weight: float) -> Source:
    """(prompts, number of the first) → 8-bit pictures; the seeds of their noise count up."""

    def draw(prompts: list[str], number: int) -> np.ndarray:
        seeds = range(first_seed + number, first_seed + number + len(prompts))
        latent = pipeline.sample(prompts, seeds, num_steps=steps, cfg_weight=cfg_weight)
        return pipeline.decode(latent)

    return draw


def measure(
    kind: Kind, scenes: SceneBatch, draw: Source, codec: Codec, scorer: Scorer, batch: int
) -> Result:
    """Draws and judges all of a kind's captions, `batch` at a time."""
    prompts, pictures, psnr = captions(scenes), [], []
    verdicts: list[list[Verdict]] = [[], [], []]
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        drawn = draw(prompts[start : start + batch], start)
        truth = render(part)
        coded = mx.clip(codec.decode(codec.encode(truth)), 0, 1)
        for found, shown in zip(verdicts, (mx.array(drawn) / 255, truth, coded), strict=True):
            found.append(judge(scorer, shown, part))
        pictures.append(drawn)
        psnr.append(np.array(picture_psnr(truth, coded)))
        click.echo(f"{kind}: {start + len(part)}/{len(scenes)}")
    joined = [joined_verdict(parts) for parts in verdicts]
    return Result(kind, prompts, np.concatenate(pictures), *joined, np.concatenate(psnr))


def joined_verdict(parts: list[Verdict]) -> Verdict:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of `right` in `n`."""
    centre = (right + Z * Z / 2) / (n + Z * Z)
    half = Z * math.sqrt(right * (n - right) / n + Z * Z / 4) / (n + Z * Z)
    return max(0.0, centre - half), min(1.0, centre + half)


def shares(verdict: Verdict) -> dict[str, dict[str, Any]]:
    """Per key of a verdict the share that is right, with its interval."""
    return {
        name: {
            "share": float(right.mean()),
            "interval": wilson_interval(int(right.sum()), len(right)),
        }
        for name, right in verdict.items()
    }


def pooled(results: list[Result], name: str) -> dict[str, dict[str, Any]]:
    return shares(joined_verdict([getattr(result, name) for result in results]))


def summary(results: list[Result]) -> list[dict[str, Any]]:
    """A row per kind, then one per sort of pairs over all numbers of objects."""
    groups = [(str(result.kind), [result]) for result in results]
    groups += [
        (f"all, {pairs} pairs", [r for r in results if r.kind.pairs == pairs]) for pairs in PAIRS
    ]
    return [
        {
            "kind": name,
            "pictures": sum(len(result.prompts) for result in group),
            "generated": pooled(group, "generated"),
            "rendered": pooled(group, "rendered"),
            "coded": pooled(group, "coded"),
            "codec_psnr": psnr_summary(np.concatenate([result.psnr for result in group])),
        }
        for name, group in groups
    ]


def markdown(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Both tables, in per cent: the pictures nano drew, and what limits their score."""
    keys = list(rows[0]["generated"])
    lines = [
        f"{settings['steps']} steps, guidance {settings['cfg_weight']:g}, {settings['dtype']}; "
        "in per cent, 95 % intervals in brackets. Captions that no training saw.",
        "",
        "| captions | n | " + " | ".join(keys) + " |",
        "|---|" + "---:|" * (len(keys) + 1),
    ]
    for row in rows:
        cells = [f"{100 * row['generated'][key]['share']:.1f}" for key in keys]
        low, high = (100 * bound for bound in row["generated"]["all"]["interval"])
        cells[keys.index("all")] += f" [{low:.1f}, {high:.1f}]"
        lines.append(f"| {row['kind']} | {row['pictures']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "What the scorer finds all right on the rendered truth of the same captions, and after "
        "the codec; the codec's PSNR, mean and worst hundredth.",
        "",
        "| captions | rendered | after the codec | PSNR, dB | worst, dB |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        truth, coded = (100 * row[name]["all"]["share"] for name in ("rendered", "coded"))
        psnr = row["codec_psnr"]
        lines.append(
            f"| {row['kind']} | {truth:.1f} | {coded:.1f} | {psnr['mean']:.1f} | "
            f"{psnr['worst_hundredth']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def save_sheets(results: list[Result], out: Path) -> None:
    """pictures.png: some of every kind as they come; failures.png: some that are not all right."""
    for name, failures_only in (("pictures.png", False), ("failures.png", True)):
        each = [np.flatnonzero(~(r.generated["all"] & failures_only)) for r in results]
        turns = zip_longest(
            *[[(r, i) for i in rows] for r, rows in zip(results, each, strict=True)]
        )
        order = [pair for turn in turns for pair in turn if pair]
        chosen = order[:SHEET]
        if chosen:
            pictures = np.stack([result.pictures[index] for result, index in chosen])
            contact_sheet(pictures, out / name, [described(*pair) for pair in chosen])


def described(result: Result, index: int) -> str:
    """The caption, and what is wrong with the picture."""
    verdict = result.generated
    wrong = [name for name, right in verdict.items() if name != "all" and not right[index]]
    return result.prompts[index] + (f" (wrong: {', '.join(wrong)})" if wrong else "")


@command()
@click.option(
    "--weights", type=click.Path(path_type=Path), required=True, help="A trained pipeline's folder."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option("--scorer", type=click.Path(path_type=Path), help="[scorer.safetensors in --weights]")
@click.option("--per-kind", default=512, help="Captions of each kind.")
@click.option("--steps", default=30, help="Sampling steps.")
@click.option("--cfg-weight", default=4.0, help="Guidance.")
@click.option("--seed", default=0, help="Of captions and noise.")
@click.option("--batch", default=256, help="Pictures at a time.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="The transformer computes in it.  [float32 on the CPU, else float16]",
)
def main(
    weights: Path, out: Path, scorer: Path | None, batch: int, dtype: str | None, **settings: Any
) -> None:
    """Judge nano's pictures; writes evaluation.json, evaluation.md, pictures.png, failures.png.

    \b
    Example:
      python -m tools.evaluate_nano --weights build/nano --out build/evaluation
    """
    started = time.perf_counter()
    chosen = getattr(mx, dtype) if dtype else default_dtype()
    settings["dtype"] = str(chosen).removeprefix("mlx.core.")
    pipeline = load_pipeline(str(weights), chosen)
    scorer_path = scorer or weights / "scorer.safetensors"
    judging = load_scorer(scorer_path)
    results = []
    for number, kind in enumerate(Kind(objects, pairs) for pairs in PAIRS for objects in OBJECTS):
        scenes = evaluation_scenes(kind, settings["seed"], settings["per_kind"])
        first_seed = FIRST_SEED + (10 * settings["seed"] + number) * settings["per_kind"]
        draw = picture_source(pipeline, first_seed, settings["steps"], settings["cfg_weight"])
        results.append(measure(kind, scenes, draw, pipeline.codec, judging, batch))
    rows = summary(results)
    files = ("transformer.safetensors", "text_encoder.safetensors", "codec.safetensors")
    report = {
        "settings": settings,
        "sha256": {
            **{name: hash_file(weights / name) for name in files},
            "scorer.safetensors": hash_file(scorer_path),
        },
        "kinds": rows,
        "seconds": time.perf_counter() - started,
    }
    write_report(out / "evaluation.json", report)
    write_bytes(out / "evaluation.md", markdown(rows, settings).encode())
    save_sheets(results, out)
    click.echo(markdown(rows, settings))
    click.echo(f"wrote {out} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
