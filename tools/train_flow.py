"""Trains nano's transformer and text encoder on encoded scenes: `python -m tools.train_flow`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src.cli import command
from src.models.configs import config_named
from src.models.load import default_dtype
from src.models.mmdit import MMDiT, Modulation
from src.models.nano.assembly import DEFAULTS, FORMAT, VERSION, assemble
from src.models.nano.captions import MAX_WORDS, NULL_ID, captions, tokenize
from src.models.nano.codec import Codec, CodecConfig
from src.models.nano.render import device_tables, draw, scene_arrays
from src.models.nano.scenes import SceneBatch, sample_scenes
from src.models.nano.text import TextConfig, TextEncoder
from src.report.sheet import contact_sheet
from src.sampling import shifted
from src.sampling.schedule import TRAINING_STEPS
from src.store import hash_file, save_tensors, write_json

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from tools.nano_common import (
    LOSSES,
    Loss,
    Terms,
    Trainer,
    compiled,
    fit,
    halved,
    is_held_out,
    load_codec,
    read_losses,
    start_or_resume,
    write_report,
)

COUNTS = (1,) * 4 + (2,) * 7 + (3,) * 9  # numbers of objects: 20 %, 35 %, 45 %
BLOCK = 256  # pictures encoded at a time: 512 make a batch of 65536 products, too many for CUDA
POOL_LIMIT = 2**18  # an array of more latents would have more elements than a 32-bit index reaches
EMBEDDING_DEVIATION = 0.02
SAMPLES = 16
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}

Pool = tuple[mx.array, mx.array]  # (n, 16, 16, 16) float16 latents and (n, 32) uint8 word ids


class TextToLatent(nn.Module):
    """The two modules that are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = MMDiT(config_named("nano"))
        self.text_encoder = TextEncoder()


def initialise(model: TextToLatent) -> None:
    """Blocks that start as the identity, an output that starts at 0, and small embeddings."""
    for _, module in model.named_modules():
        if isinstance(module, Modulation):
            zero(module.layers[1])
        elif isinstance(module, nn.Embedding):
            module.weight = EMBEDDING_DEVIATION * mx.random.normal(module.weight.shape)
    zero(model.transformer.final_layer.linear)
    model.text_encoder.positions.weight = EMBEDDING_DEVIATION * mx.random.normal(
        model.text_encoder.positions.weight.shape
    )


def zero(linear: nn.Linear) -> None:
    linear.update(tree_map(mx.zeros_like, linear.parameters()))


def trained_scenes(rng: np.random.Generator, n: int) -> tuple[SceneBatch, np.ndarray]:
    """`n` scenes whose captions are not held out, and the captions' word ids as uint8."""
    scenes = sample_scenes(rng, n + n // 8 + 64, counts=COUNTS)
    ids = tokenize(captions(scenes))
    kept = np.flatnonzero(~is_held_out(ids))[:n]
    return scenes[kept], ids[kept].astype(np.uint8)


def held_out_captions(rng: np.random.Generator, n: int) -> list[str]:
    """`n` captions that no training sees."""
    texts = captions(sample_scenes(rng, 64 * n, counts=COUNTS))
    return [text for text in texts if is_held_out(tokenize([text]))[0]][:n]


def encoded_pools(codec: Codec, seed: int, count: int) -> list[Pool]:
    """About `count` scenes, encoded, in pools of equal size on the device."""
    pools = -(-count // POOL_LIMIT)
    block = min(BLOCK, count // pools)
    blocks = count // pools // block
    encode = compiled(lambda scenes: codec.encode(draw(scenes)).astype(mx.float16))
    result = []
    started = time.perf_counter()
    for index in range(pools):
        parts = list(encoded_blocks(encode, seed, index, block, blocks))
        latents, ids = (mx.concatenate(arrays) for arrays in zip(*parts, strict=True))
        mx.eval(latents, ids)
        result.append((latents, ids))
        done, seconds = (index + 1) * blocks * block, time.perf_counter() - started
        click.echo(f"encoded {done}/{pools * blocks * block} scenes in {seconds:.0f} s")
    return result


def encoded_blocks(
    encode: Callable[[dict[str, mx.array]], mx.array], seed: int, pool: int, block: int, blocks: int
) -> Iterator[Pool]:
    """A pool, block by block; the device encodes while the host writes the next captions."""
    waiting = None
    for index in range(blocks):
        scenes, ids = trained_scenes(np.random.default_rng([seed, 3, pool, index]), block)
        latents = encode(scene_arrays(scenes))
        mx.async_eval(latents)
        if waiting is not None:
            mx.eval(waiting)
        waiting = latents
        yield latents, mx.array(ids)


def flow_loss(model: TextToLatent, batch: int, dropout: float, dtype: mx.Dtype) -> Loss:
    """The squared error of the velocity of a batch from a pool.

    The transformer computes in `dtype`; the text encoder, whose few words take the sum of many
    gradients, in float32.
    """
    null = mx.array([NULL_ID] + [0] * (MAX_WORDS - 1))

    def loss(key: mx.array, latents: mx.array, ids: mx.array) -> tuple[mx.array, Terms]:
        pick, drop, level, disturb = mx.random.split(key, 4)
        rows = mx.random.randint(0, len(latents), (batch,), key=pick)
        clean, words = latents[rows].astype(mx.float32), ids[rows].astype(mx.int32)
        words = mx.where(mx.random.uniform(shape=(batch, 1), key=drop) < dropout, null, words)
        sigma = shifted(mx.sigmoid(mx.random.normal((batch,), key=level)), DEFAULTS.shift)
        noise = mx.random.normal(clean.shape, key=disturb)
        mixed = clean + sigma[:, None, None, None] * (noise - clean)
        text, pooled = model.text_encoder(words)
        transformer = model.transformer
        transformer.update(tree_map(lambda a: a.astype(dtype), transformer.parameters()))
        velocity = transformer(
            mixed.astype(dtype), text.astype(dtype), pooled.astype(dtype), TRAINING_STEPS * sigma
        )
        return mx.square(velocity.astype(mx.float32) - (noise - clean)).mean(), {}

    return loss


def sampler(trainer: Trainer, codec: Codec, out: Path, seed: int, every: int) -> Callable:
    """steps done → None: draws pictures of held-out captions from the average, `every` 0 never."""
    prompts = held_out_captions(np.random.default_rng([seed, 4]), SAMPLES)
    model = TextToLatent()

    def draw_samples(done: int) -> None:
        if every == 0 or (done % every and done != trainer.steps):
            return
        model.update(tree_map(mx.array, trainer.average))
        parts = (model.transformer, model.text_encoder, codec)
        pipeline = assemble("nano", "in training", *parts, DEFAULTS, default_dtype())
        pictures = pipeline.decode(pipeline.sample(prompts, range(SAMPLES)))
        path = out / "samples" / f"{done:06d}.png"
        contact_sheet(pictures, path, prompts)
        click.echo(f"wrote {path}")

    return draw_samples


def export(trainer: Trainer, codec: Path, out: Path) -> None:
    """A folder that `load_pipeline` reads: the averaged weights in float16, codec and config."""
    for name in ("transformer", "text_encoder"):
        save_tensors(out / f"{name}.safetensors", halved(trainer.average[name]))
    save_tensors(out / "codec.safetensors", halved(load_codec(codec).parameters()))
    config = {
        "format": FORMAT,
        "version": VERSION,
        "name": "nano",
        "transformer": config_named("nano").to_dict(),
        "text_encoder": asdict(TextConfig()),
        "codec": asdict(CodecConfig()),
        "sampling": asdict(DEFAULTS),
    }
    write_json(out / "config.json", config)


@command()
@click.option(
    "--codec", type=click.Path(path_type=Path), required=True, help="The trained codec.safetensors."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option("--scenes", default=1_500_000, help="Scenes to encode, 8 KB of device memory each.")
@click.option("--steps", default=40000, help="Training steps.")
@click.option("--batch", default=256, help="Latents a step.")
@click.option("--lr", default=1e-3, help="Peak learning rate.")
@click.option("--warm-up", default=1000, help="Steps of rising rate, at most a tenth of all.")
@click.option("--dropout", default=0.1, help="Share of captions replaced by the empty one.")
@click.option("--average", default=0.9995, help="Decay of the weights' moving average.")
@click.option("--seed", default=0, help="Of weights, scenes and noise.")
@click.option(
    "--dtype",
    default="float32",
    type=click.Choice(list(DTYPES)),
    help="The transformer computes in it; parameters and their updates are float32.",
)
@click.option("--log-every", default=100, help="Steps between loss lines.")
@click.option("--save-every", default=2000, help="Steps between checkpoints.")
@click.option("--sample-every", default=5000, help="Steps between sheets of samples; 0: none.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
def main(
    codec: Path,
    out: Path,
    log_every: int,
    save_every: int,
    sample_every: int,
    resume: bool,
    **settings: Any,
) -> None:
    """Train nano's transformer and text encoder; writes a pipeline's folder and training.json.

    \b
    Example:
      python -m tools.train_flow --codec build/codec/codec.safetensors --out build/nano
    """
    started = time.perf_counter()
    seed, batch = settings["seed"], settings["batch"]
    loaded, settings["codec"] = load_codec(codec), hash_file(codec)
    out.mkdir(parents=True, exist_ok=True)
    device_tables()  # made before a step is traced
    mx.random.seed(seed)
    model = TextToLatent()
    initialise(model)
    trainer = Trainer(
        model,
        flow_loss(model, batch, settings["dropout"], DTYPES[settings["dtype"]]),
        steps=settings["steps"],
        peak=settings["lr"],
        warm_up=settings["warm_up"],
        average_decay=settings["average"],
        seed=seed,
    )
    start_or_resume(trainer, out, settings, resume)
    unfinished = trainer.done < trainer.steps
    pools = encoded_pools(loaded, seed, settings["scenes"]) if unfinished else []
    fit(
        trainer,
        lambda step: pools[step % len(pools)],
        out,
        settings,
        log_every=log_every,
        save_every=save_every,
        after_step=sampler(trainer, loaded, out, seed, sample_every),
    )
    export(trainer, codec, out)
    report = {
        "settings": settings,
        "object_counts": COUNTS,
        "losses": read_losses(out / LOSSES),
        "seconds_of_last_run": time.perf_counter() - started,
    }
    write_report(out / "training.json", report)
    click.echo(f"wrote {out} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
