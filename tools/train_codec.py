"""Trains nano's codec on scenes that are drawn on the device: `python -m tools.train_codec`."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from src.cli import command
from src.models.nano.codec import Codec, CodecConfig
from src.models.nano.render import device_tables, draw, scene_arrays
from src.models.nano.scenes import sample_scenes
from src.report.sheet import contact_sheet
from src.store import save_tensors

import click
import mlx.core as mx
import numpy as np

from tools.nano_common import (
    LOSSES,
    Loss,
    Terms,
    Trainer,
    compiled,
    eight_bits,
    fit,
    halved,
    load_codec,
    picture_psnr,
    psnr_summary,
    read_losses,
    start_or_resume,
    write_report,
)

ABSOLUTE_WEIGHT = 0.01
EDGE_WEIGHT = 0.02
LATENT_WEIGHT = 1e-3
MEASURED_NOISE = (0.0, 0.05, 0.1, 0.2)  # deviations of latent noise that the report tells PSNR for
MEASURE_BATCH = 128

Scenes = dict[str, mx.array]


def edges(picture: mx.array) -> tuple[mx.array, mx.array]:
    """Differences of neighbouring pixels, downwards and to the right."""
    return picture[:, 1:] - picture[:, :-1], picture[:, :, 1:] - picture[:, :, :-1]


def reconstruction_terms(picture: mx.array, decoded: mx.array) -> Terms:
    """Squared and absolute error of the pixels, and absolute error of their differences.

    Pixels rule the PSNR; the differences keep the outlines of small objects sharp.
    """
    pairs = zip(edges(picture), edges(decoded), strict=True)
    return {
        "squared": mx.square(decoded - picture).mean(),
        "absolute": mx.abs(decoded - picture).mean(),
        "edge": sum(mx.abs(found - wanted).mean() for wanted, found in pairs),
    }


def codec_loss(codec: Codec, batch: int, noise: float) -> Loss:
    """The loss of a batch of scenes drawn from a pool.

    The latent gets noise before it is decoded, so that the decoder bears a diffusion model's
    errors, and is drawn to mean 0 and deviation 1 in every channel, so that noise means noise.
    """

    def loss(key: mx.array, scenes: Scenes) -> tuple[mx.array, Terms]:
        pick, disturb = mx.random.split(key)
        rows = mx.random.randint(0, len(scenes["count"]), (batch,), key=pick)
        picture = draw({name: array[rows] for name, array in scenes.items()})
        latent = codec.encoder(picture)
        mean = latent.mean(axis=(0, 1, 2))
        deviation = mx.sqrt(mx.square(latent - mean).mean(axis=(0, 1, 2)) + 1e-6)
        noisy = latent + noise * deviation * mx.random.normal(latent.shape, key=disturb)
        terms = reconstruction_terms(picture, codec.decoder(noisy))
        terms["latent"] = mx.square(mean).mean() + mx.square(deviation - 1).mean()
        total = terms["squared"] + ABSOLUTE_WEIGHT * terms["absolute"]
        total = total + EDGE_WEIGHT * terms["edge"] + LATENT_WEIGHT * terms["latent"]
        return total, terms

    return loss


def scene_pools(seed: int, size: int, chunk: int) -> Any:
    """step → (scenes on the device,): a fresh pool of `size` scenes every `chunk` steps."""

    @lru_cache(maxsize=1)
    def pool(index: int) -> Scenes:
        rng = np.random.default_rng([seed, index])
        return scene_arrays(sample_scenes(rng, size))

    return lambda step: (pool(step // chunk),)


def measure_latents(codec: Codec, rng: np.random.Generator, count: int) -> float:
    """Sets `codec.mean` and `codec.std` to those of `count` fresh pictures, per channel.

    Gives the largest distance from the mean, in deviations: outliers are hard to diffuse.
    """
    encode = compiled(lambda scenes: moments(codec.encoder(draw(scenes))))
    parts = []
    for start in range(0, count, MEASURE_BATCH):
        scenes = sample_scenes(rng, min(MEASURE_BATCH, count - start))
        parts.append(np.array(encode(scene_arrays(scenes)), dtype=np.float64))
    weights = np.minimum(MEASURE_BATCH, count - np.arange(0, count, MEASURE_BATCH))
    found = np.stack(parts)
    mean, square = np.average(found[:, :2], axis=0, weights=weights)
    deviation = np.sqrt(square - mean**2)
    codec.mean, codec.std = (mx.array(v.astype(np.float32)) for v in (mean, deviation))
    lowest, highest = found[:, 2].min(axis=0), found[:, 3].max(axis=0)
    return float(np.max(np.maximum(highest - mean, mean - lowest) / deviation))


def moments(latent: mx.array) -> mx.array:
    """(4, channels): mean, mean square, smallest and largest."""
    axes = (0, 1, 2)
    square = mx.square(latent).mean(axis=axes)
    return mx.stack([latent.mean(axis=axes), square, latent.min(axis=axes), latent.max(axis=axes)])


def measure_psnr(codec: Codec, rng: np.random.Generator, pairs: str, count: int) -> dict[str, Any]:
    """PSNR of `count` fresh pictures, by the deviation of noise on the latent (its own is 1)."""

    def round_trip(scenes: Scenes, noise: mx.array, key: mx.array) -> mx.array:
        picture = draw(scenes)
        latent = codec.encode(picture)
        latent = latent + noise * mx.random.normal(latent.shape, key=key)
        return picture_psnr(picture, codec.decode(latent))

    run = compiled(round_trip)
    found: dict[float, list[np.ndarray]] = {level: [] for level in MEASURED_NOISE}
    for start in range(0, count, MEASURE_BATCH):
        scenes = scene_arrays(sample_scenes(rng, min(MEASURE_BATCH, count - start), pairs=pairs))
        for level in MEASURED_NOISE:
            found[level].append(np.array(run(scenes, mx.array(level), mx.random.key(start))))
    return {f"noise_{level}": psnr_summary(np.concatenate(found[level])) for level in found}


def save_examples(codec: Codec, path: Path, seed: int) -> None:
    """A contact sheet: pictures, each above what the codec makes of it."""
    picture = draw(scene_arrays(sample_scenes(np.random.default_rng(seed), 24)))
    decoded = codec.decode(codec.encode(picture))
    rows = [part[i : i + 8] for i in range(0, 24, 8) for part in (picture, decoded)]
    contact_sheet(eight_bits(mx.concatenate(rows)), path)


def export(codec: Codec, path: Path, seed: int, latent_pictures: int) -> float:
    """Rounds the weights to float16, measures the latents and writes the file.

    Gives the latents' largest distance from their mean, in deviations.
    """
    rounded = {name: array.astype(mx.float32) for name, array in halved(codec.parameters()).items()}
    codec.load_weights(list(rounded.items()))
    extreme = measure_latents(codec, np.random.default_rng([seed, 1, 1]), latent_pictures)
    save_tensors(path, halved(codec.parameters()))
    return extreme


@command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option("--steps", default=12000, help="Training steps.")
@click.option("--batch", default=128, help="Pictures a step.")
@click.option("--lr", default=1e-3, help="Peak learning rate.")
@click.option("--warm-up", default=500, help="Steps of rising rate, at most a tenth of all.")
@click.option("--noise", default=0.04, help="On the latent while training, of its deviation.")
@click.option("--average", default=0.999, help="Decay of the weights' moving average.")
@click.option("--seed", default=0, help="Of weights, scenes and noise.")
@click.option("--chunk", default=500, help="Steps that share a pool of chunk x batch scenes.")
@click.option("--log-every", default=100, help="Steps between loss lines.")
@click.option("--save-every", default=1000, help="Steps between checkpoints.")
@click.option("--test-pictures", default=2048, help="Fresh pictures for each PSNR.")
@click.option("--latent-pictures", default=8192, help="Fresh pictures for the latents' scale.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
def main(
    out: Path,
    log_every: int,
    save_every: int,
    test_pictures: int,
    latent_pictures: int,
    resume: bool,
    **settings: Any,
) -> None:
    """Train nano's codec; writes codec.safetensors and codec.json.

    \b
    Example:
      python -m tools.train_codec --out build/codec
    """
    started = time.perf_counter()
    seed, batch, steps = settings["seed"], settings["batch"], settings["steps"]
    out.mkdir(parents=True, exist_ok=True)
    device_tables()  # made before the step is traced
    mx.random.seed(seed)
    codec = Codec()
    codec.freeze(keys=["mean", "std"], recurse=False)
    trainer = Trainer(
        codec,
        codec_loss(codec, batch, settings["noise"]),
        steps=steps,
        peak=settings["lr"],
        warm_up=settings["warm_up"],
        average_decay=settings["average"],
        seed=seed,
    )
    start_or_resume(trainer, out, settings, resume)
    pools = scene_pools(seed, settings["chunk"] * batch, settings["chunk"])
    fit(trainer, pools, out, settings, log_every=log_every, save_every=save_every)

    averaged = Codec()
    averaged.update(trainer.average)
    extreme = export(averaged, out / "codec.safetensors", seed, latent_pictures)
    trained = load_codec(out / "codec.safetensors")
    psnr = {
        pairs: measure_psnr(trained, np.random.default_rng([seed, 2, 2]), pairs, test_pictures)
        for pairs in ("seen", "unseen")
    }
    save_examples(trained, out / "codec.png", seed + 1)
    report = {
        "settings": settings,
        "config": asdict(CodecConfig()),
        "loss_weights": {"absolute": ABSOLUTE_WEIGHT, "edge": EDGE_WEIGHT, "latent": LATENT_WEIGHT},
        "psnr": psnr,
        "latent_pictures": latent_pictures,
        "largest_latent": extreme,
        "test_pictures": test_pictures,
        "losses": read_losses(out / LOSSES),
        "seconds_of_last_run": time.perf_counter() - started,
    }
    write_report(out / "codec.json", report)
    for pairs, by_noise in psnr.items():
        best = by_noise["noise_0.0"]
        click.echo(f"{pairs}: PSNR {best['mean']:.2f} dB, worst {best['worst_hundredth']:.2f} dB")
    click.echo(f"wrote {out / 'codec.safetensors'} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
