"""Trains the scorer on scenes drawn on the fly: ``python -m tools.train_scorer --out FOLDER``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from src.models.nano.judge import accuracy, judge
from src.models.nano.render import draw, render, scene_arrays
from src.models.nano.scenes import DATA_VERSION, MAX_OBJECTS, sample_scenes
from src.models.nano.scorer import (
    ATTRIBUTES,
    CELL,
    GRID_SIZE,
    Scorer,
    load_scorer,
    parameter_count,
    save_scorer,
)

import click
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

CHUNK = 65536
TRAINING_JITTER = 8.0
CENTRE_SIGMA = 0.7
EMA_DECAY = 0.999
EVALUATION_SCENES = 2048

Arrays = dict[str, mx.array]


def smooth(pictures: mx.array) -> mx.array:
    """A 5x5 binomial blur of (n, h, w, 3) pictures."""
    for _ in range(2):
        tall = mx.pad(pictures, [(0, 0), (1, 1), (0, 0), (0, 0)], mode="edge")
        pictures = 0.25 * tall[:, :-2] + 0.5 * pictures + 0.25 * tall[:, 2:]
        wide = mx.pad(pictures, [(0, 0), (0, 0), (1, 1), (0, 0)], mode="edge")
        pictures = 0.25 * wide[:, :, :-2] + 0.5 * pictures + 0.25 * wide[:, :, 2:]
    return pictures


def coarse_noise(shape: tuple[int, ...], cell: int) -> mx.array:
    """Normal noise that is constant on squares of ``cell`` pixels, like a codec's block errors."""
    n, height, width, channels = shape
    noise = mx.random.normal((n, height // cell, 1, width // cell, 1, channels))
    wide = mx.broadcast_to(noise, (n, height // cell, cell, width // cell, cell, channels))
    return wide.reshape(shape)


def augment(pictures: mx.array) -> mx.array:
    """What a codec or a sampler may do to a picture: blur, noise, other brightness and colour.

    One picture in four stays as it was rendered.
    """
    n = len(pictures)

    def strength(low: float, high: float, channels: int = 1) -> mx.array:
        return mx.random.uniform(low, high, (n, 1, 1, channels))

    changed = pictures + strength(0, 1) * (smooth(pictures) - pictures)
    mean = changed.mean(axis=(1, 2), keepdims=True)
    changed = mean + (changed - mean) * strength(0.88, 1.12)
    changed = changed * strength(0.95, 1.05, 3) + strength(-0.05, 0.05)
    changed = changed + mx.square(strength(0, 0.25)) * mx.random.normal(pictures.shape)
    changed = changed + strength(0, 0.02) * smooth(coarse_noise(pictures.shape, 4))
    return mx.where(strength(0, 1) < 0.25, pictures, mx.clip(changed, 0, 1))


def centre_weights(scenes: Arrays) -> tuple[mx.array, mx.array]:
    """How near each cell is to each object, (n, 256, 3), a Gaussian; the way there, (n, 256, 3, 2).

    The way is from the cell's centre to the object's, in cells.
    """
    axis = mx.arange(GRID_SIZE, dtype=mx.float32) + 0.5
    across = (scenes["x"] / CELL)[:, None, None, :] - axis[None, None, :, None]
    down = (scenes["y"] / CELL)[:, None, None, :] - axis[None, :, None, None]
    across, down = mx.broadcast_arrays(across, down)
    offset = mx.stack([across, down], axis=-1).reshape(len(across), -1, MAX_OBJECTS, 2)
    near = mx.exp(-mx.sum(mx.square(offset), axis=-1) / (2 * CENTRE_SIGMA**2))
    present = mx.arange(MAX_OBJECTS) < scenes["count"][:, None]
    return near * present[:, None, :], offset


def heat_loss(logits: mx.array, near: mx.array) -> mx.array:
    """Focal loss on the centre heat, per object: the nearest cell is the positive one, and cells
    beside it count less as negatives.
    """
    target = near.max(axis=2)
    centre = mx.any((near == near.max(axis=1, keepdims=True)) & (near > 0), axis=2)
    logits = logits.reshape(target.shape)
    heat = mx.sigmoid(logits)
    positive = -mx.square(1 - heat) * nn.log_sigmoid(logits)
    negative = -mx.power(1 - target, 4) * mx.square(heat) * nn.log_sigmoid(-logits)
    return mx.where(centre, positive, negative).sum() / centre.sum()


def scorer_loss(scorer: Scorer, pictures: mx.array, scenes: Arrays) -> mx.array:
    """The sum of the losses of all heads; attributes count near the objects' centres only."""
    logits = scorer(pictures)
    near, offset = centre_weights(scenes)
    share = mx.where(near > 0.3, near, 0)
    share = share / share.sum()
    loss = heat_loss(logits["heat"], near)
    for name in ATTRIBUTES:
        values = logits[name].reshape(len(pictures), GRID_SIZE**2, -1)
        values = values - mx.logsumexp(values, axis=-1, keepdims=True)
        chosen = mx.arange(values.shape[-1])[:, None] == scenes[name][:, None, :]
        loss = loss - mx.sum(share * (values @ chosen.astype(mx.float32)))
    guess = logits["offset"].reshape(len(pictures), GRID_SIZE**2, 1, 2)
    loss = loss + mx.sum(share[..., None] * mx.abs(guess - offset))
    return loss + nn.losses.cross_entropy(
        logits["background"], scenes["background"], reduction="mean"
    )


def training_batches(seed: int, batch: int) -> Iterator[Arrays]:
    """Endless batches of scene arrays on the device, sampled a large chunk at a time.

    All pairs occur, the held-out ones too: the judge must not read them worse than others.
    """
    rng = np.random.default_rng(seed)
    chunk = max(CHUNK // batch, 1) * batch
    while True:
        scenes = scene_arrays(sample_scenes(rng, chunk, pairs="all", jitter=TRAINING_JITTER))
        for start in range(0, chunk, batch):
            yield {name: array[start : start + batch] for name, array in scenes.items()}


def learning_rate(peak: float, steps: int) -> Callable[[mx.array], mx.array]:
    """Linear warm-up over a twentieth of the steps, then a cosine to zero."""
    warm_up = max(steps // 20, 1)
    rise = optim.linear_schedule(peak / warm_up, peak, warm_up)
    return optim.join_schedules([rise, optim.cosine_decay(peak, steps - warm_up)], [warm_up])


def train(steps: int, batch: int, seed: int, peak: float, log_every: int) -> tuple[Scorer, list]:
    """The scorer with averaged weights after ``steps`` steps, and [step, loss] pairs."""
    mx.random.seed(seed)
    scorer = Scorer()
    optimizer = optim.AdamW(learning_rate(peak, steps), weight_decay=0.02)
    optimizer.init(scorer.trainable_parameters())
    average = tree_map(lambda array: mx.array(array), scorer.parameters())
    state = [scorer.state, optimizer.state, mx.random.state]
    loss_and_gradient = nn.value_and_grad(scorer, scorer_loss)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(scenes: Arrays, average: dict, decay: mx.array) -> tuple[mx.array, dict]:
        loss, gradient = loss_and_gradient(scorer, augment(draw(scenes)), scenes)
        gradient, _ = optim.clip_grad_norm(gradient, 2.0)
        optimizer.update(scorer, gradient)
        mixed = tree_map(lambda a, b: decay * a + (1 - decay) * b, average, scorer.parameters())
        return loss, mixed

    losses, window, started = [], [], time.perf_counter()
    for index, scenes in zip(range(1, steps + 1), training_batches(seed, batch), strict=False):
        decay = mx.array(min(EMA_DECAY, index / (index + 10)))
        loss, average = step(scenes, average, decay)
        mx.eval(loss, average, state)
        window.append(loss)
        if index % log_every == 0 or index == steps:
            losses.append([index, float(mx.mean(mx.stack(window)))])
            seconds = time.perf_counter() - started
            click.echo(f"step {index}/{steps}  loss {losses[-1][1]:.4f}  {seconds:.0f} s")
            window = []
    scorer.update(average)
    return scorer, losses


def evaluate(scorer: Scorer, seed: int, n: int) -> dict[str, dict[str, float]]:
    """Accuracy on fresh scenes of seen and of held-out pairs, as rendered and with augmentation."""
    results = {}
    for pairs in ("seen", "unseen"):
        scenes = sample_scenes(np.random.default_rng(seed), n, pairs=pairs)
        pictures = mx.concatenate([render(scenes[i : i + 128]) for i in range(0, n, 128)])
        results[pairs] = accuracy(judge(scorer, pictures, scenes))
        mx.random.seed(seed)
        changed = mx.concatenate([augment(pictures[i : i + 128]) for i in range(0, n, 128)])
        results[f"{pairs}, augmented"] = accuracy(judge(scorer, changed, scenes))
    return results


@click.command()
@click.option("--steps", default=8000, show_default=True, help="Training steps.")
@click.option("--batch", default=256, show_default=True, help="Pictures per step.")
@click.option("--seed", default=0, show_default=True, help="Seed of weights, scenes and noise.")
@click.option("--lr", default=2e-3, show_default=True, help="Peak learning rate.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option("--log-every", default=100, show_default=True, help="Steps between loss lines.")
@click.option("--scenes", default=EVALUATION_SCENES, show_default=True, help="Scenes per test set.")
def main(
    steps: int, batch: int, seed: int, lr: float, out: Path, log_every: int, scenes: int
) -> None:
    """Train the scorer of nano pictures and write scorer.safetensors and scorer.json."""
    scorer, losses = train(steps, batch, seed, lr, log_every)
    out.mkdir(parents=True, exist_ok=True)
    save_scorer(scorer, out / "scorer.safetensors")
    results = evaluate(load_scorer(out / "scorer.safetensors"), seed + 1_000_003, scenes)
    for name, shares in results.items():
        line = "  ".join(f"{key} {100 * share:.2f}" for key, share in shares.items())
        click.echo(f"{name}: {line}")
    report = {
        "data_version": DATA_VERSION,
        "parameters": parameter_count(scorer),
        "steps": steps,
        "batch": batch,
        "seed": seed,
        "learning_rate": lr,
        "losses": losses,
        "accuracy": results,
        "evaluation_scenes": scenes,
    }
    (out / "scorer.json").write_text(json.dumps(report, indent=1) + "\n")
    size = sum(array.nbytes for _, array in tree_flatten(scorer.parameters())) / 2e6
    click.echo(f"wrote {out / 'scorer.safetensors'} ({size:.2f} MB) and scorer.json")


if __name__ == "__main__":
    main()
