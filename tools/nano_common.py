"""What the tools that train and measure nano share: training loop, checkpoints, contact sheets."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.cli import peak_memory_bytes
from src.errors import UserError
from src.models.nano.codec import Codec
from src.models.nano.scenes import DATA_VERSION
from src.store import (
    load_tensors,
    read_header,
    require_match,
    save_tensors,
    write_bytes,
    write_json,
)

import click
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
STEPS_AHEAD = 2  # steps that wait on the device while the host prepares the next
HELD_OUT_SHARE = 16  # one caption in so many is never trained on
CHECKPOINT = "checkpoint.safetensors"
LOSSES = "losses.jsonl"

Terms = dict[str, mx.array]
# (key, *inputs) to the loss and the terms to log, with the parameters already in the model.
Loss = Callable[..., tuple[mx.array, Terms]]


def on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def compiled(function: Callable[..., Any], state: Any = None) -> Callable[..., Any]:
    """`function` compiled, on the CPU as it is: there a C++ compiler starts for little gain."""
    return function if on_cpu() else mx.compile(function, inputs=state, outputs=state)


def warmed_cosine(peak: float, steps: int, warm_up: int) -> Callable[[mx.array], mx.array]:
    """The learning rate of a step: a linear rise to `peak`, then a cosine to 0 at the end."""

    def rate(step: mx.array) -> mx.array:
        step = step.astype(mx.float32)
        fall = mx.clip((step - warm_up) / max(steps - warm_up, 1), 0, 1)
        cosine = 0.5 * (1 + mx.cos(math.pi * fall))
        return peak * mx.minimum((step + 1) / warm_up, cosine)

    return rate


class Trainer:
    """Float32 parameters, their moving average and AdamW's moments, moved by one compiled step.

    What a step draws at random depends on the seed and the step's number alone, so a training
    that was cut and resumed goes the same way as one that was not.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        steps: int,
        peak: float,
        warm_up: int,
        average_decay: float,
        seed: int,
    ) -> None:
        self.steps = steps
        self._model, self._loss = model, loss
        self._average_decay, self._seed = average_decay, seed
        warm_up = max(1, min(warm_up, steps // 10))
        self._optimizer = optim.AdamW(
            warmed_cosine(peak, steps, warm_up), BETAS, 1e-8, WEIGHT_DECAY, bias_correction=True
        )
        parameters = model.trainable_parameters()
        self._optimizer.init(parameters)
        self.state = {
            "parameters": parameters,
            "average": tree_map(mx.array, parameters),
            "optimizer": self._optimizer.state,
        }
        mx.eval(self.state)
        self.step = compiled(self._step, self.state)

    @property
    def done(self) -> int:
        """Steps that are finished."""
        return self._optimizer.step.item()

    @property
    def average(self) -> dict[str, Any]:
        """The averaged parameters, a tree of float32 arrays: what ships."""
        return self.state["average"]

    def _step(self, *inputs: Any) -> Terms:
        """One update of the whole state; the loss and its terms."""
        step = self._optimizer.step.astype(mx.uint32)
        key = mx.stack([mx.array(self._seed, dtype=mx.uint32), step])

        def forward(parameters: dict[str, Any]) -> tuple[mx.array, Terms]:
            self._model.update(parameters)
            return self._loss(key, *inputs)

        (loss, terms), gradients = mx.value_and_grad(forward)(self.state["parameters"])
        gradients, norm = optim.clip_grad_norm(gradients, MAX_GRADIENT_NORM)
        parameters = self._optimizer.apply_gradients(gradients, self.state["parameters"])
        seen = step.astype(mx.float32)
        decay = mx.minimum(self._average_decay, (1 + seen) / (10 + seen))
        self.state["average"] = tree_map(
            lambda old, new: new + decay * (old - new), self.state["average"], parameters
        )
        self.state["parameters"] = parameters
        return {"loss": loss, **terms, "gradient_norm": norm}

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Everything that `load` needs to go on."""
        metadata = {"format": "mlx", "settings": json.dumps(settings)}
        save_tensors(path, dict(tree_flatten(self.state)), metadata)

    def load(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint that was made with the same settings."""
        _, metadata = read_header(path)
        found = json.loads(metadata.get("settings", "{}"))
        require_match(path, found, settings, "give the same options, or another --out")
        wanted = {name: (array.dtype, array.shape) for name, array in tree_flatten(self.state)}
        tensors = load_tensors(path, expect=wanted)
        self.state.update(tree_map_with_path(lambda name, _: tensors[name], self.state))
        self._optimizer.state = self.state["optimizer"]
        mx.eval(self.state)


def start_or_resume(trainer: Trainer, out: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Loads the checkpoint in `out`; one that nobody asked to resume is not overwritten."""
    path = out / CHECKPOINT
    if not path.exists():
        return
    if not resume:
        raise UserError(f"{path} exists: --resume goes on from it, another --out starts afresh")
    trainer.load(path, settings)
    click.echo(f"resumed after step {trainer.done}")


def fit(
    trainer: Trainer,
    inputs: Callable[[int], tuple],
    out: Path,
    settings: Mapping[str, Any],
    *,
    log_every: int,
    save_every: int,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Runs the steps that are left; logs the mean of every term and saves checkpoints.

    `inputs(step)` gives what the step reads, `after_step(steps done)` is called after each.
    """
    first, steps = trainer.done, trainer.steps
    forget_losses(out / LOSSES, first)
    window: list[Terms] = []
    started, counted = time.perf_counter(), 0
    for step in range(first, steps):
        window.append(trainer.step(*inputs(step)))
        mx.async_eval(trainer.state, window[-1])
        if len(window) > STEPS_AHEAD:
            mx.eval(window[-1 - STEPS_AHEAD])
        counted, finished = counted + 1, step + 1
        if finished % log_every == 0 or finished == steps or step == first:
            means = {name: mean_of([terms[name] for terms in window]) for name in window[0]}
            speed = counted / (time.perf_counter() - started)
            log_losses(out / LOSSES, finished, steps, means, speed)
            window, started, counted = [], time.perf_counter(), 0
        if finished % save_every == 0 or finished == steps:
            trainer.save(out / CHECKPOINT, settings)
        after_step(finished)


def mean_of(scalars: Sequence[mx.array]) -> float:
    return float(np.mean([scalar.item() for scalar in scalars]))


def log_losses(path: Path, step: int, steps: int, means: dict[str, float], speed: float) -> None:
    """One line on the screen and one in the file; a loss that is not finite ends the training."""
    terms = "  ".join(f"{name} {value:.5f}" for name, value in means.items())
    peak = peak_memory_bytes() / 1e9
    click.echo(f"step {step}/{steps}  {terms}  {speed:.2f} steps/s  peak {peak:.1f} GB")
    if not math.isfinite(means["loss"]):
        raise UserError(f"the loss is {means['loss']} at step {step}; try a lower --lr")
    with path.open("a") as file:
        file.write(json.dumps({"step": step, **means, "steps_per_second": speed}) + "\n")


def read_losses(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def forget_losses(path: Path, last: int) -> None:
    """Drops what was logged after step `last`, which is going to be run again."""
    kept = [json.dumps(row) + "\n" for row in read_losses(path) if row["step"] <= last]
    write_bytes(path, "".join(kept).encode())


def halved(tree: Any) -> dict[str, mx.array]:
    """The tree's arrays by name in float16; one that does not fit is an error."""
    tensors = {name: array.astype(mx.float16) for name, array in tree_flatten(tree)}
    for name, tensor in tensors.items():
        if not mx.all(mx.isfinite(tensor)).item():
            raise UserError(f"tensor {name} is not finite in float16; train again, lower --lr")
    return tensors


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """A JSON file of results, with what they were made with."""
    environment = {
        "data_version": DATA_VERSION,
        "device": str(mx.device_info().get("device_name", mx.default_device())),
        "mlx": mx.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    write_json(path, {**report, "environment": environment})


def load_codec(path: Path) -> Codec:
    """The codec of a file, in float32."""
    codec = Codec()
    wanted = {name: ("float16", array.shape) for name, array in tree_flatten(codec.parameters())}
    tensors = load_tensors(path, expect=wanted, hint="run `python -m tools.train_codec` first")
    codec.load_weights([(name, array.astype(mx.float32)) for name, array in tensors.items()])
    return codec


def picture_psnr(pictures: mx.array, others: mx.array) -> mx.array:
    """PSNR in dB, (batch,), of pictures (batch, height, width, 3) that are clipped to 0…1."""
    error = mx.square(mx.clip(pictures, 0, 1) - mx.clip(others, 0, 1)).mean(axis=(1, 2, 3))
    return -10 * mx.log10(mx.maximum(error, 1e-10))


def psnr_summary(psnr: np.ndarray) -> dict[str, float]:
    """Mean over pictures, and mean of the worst hundredth of them, in dB."""
    worst = np.sort(psnr)[: max(1, len(psnr) // 100)]
    return {"mean": float(psnr.mean()), "worst_hundredth": float(worst.mean())}


def is_held_out(ids: np.ndarray) -> np.ndarray:
    """(n,) which captions, given as (n, words) ids, no training sees: one in sixteen.

    A hash of the words decides (FNV-1a), not a stored list, so it is the same for every seed and
    any number of scenes.
    """
    hashed = np.full(len(ids), 0xCBF29CE484222325, dtype=np.uint64)
    for column in np.ascontiguousarray(ids.T).astype(np.uint64):
        hashed = (hashed ^ column) * np.uint64(0x100000001B3)
    return (hashed >> np.uint64(40)) % np.uint64(HELD_OUT_SHARE) == 0


def eight_bits(pictures: mx.array) -> np.ndarray:
    """Pictures in 0…1 as uint8."""
    return np.array(mx.round(255 * mx.clip(pictures, 0, 1)).astype(mx.uint8))
