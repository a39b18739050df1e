"""The whole network's rounding tuned on the guided velocity of the 16-bit model.

Finished calibration latents are noised afresh in every iteration, to a sigma anywhere along the
schedule, so that no trajectory can be learned by heart. The loss is the logarithm of the
velocity's relative error: what the fidelity protocol reports, in other units.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from tqdm import tqdm

from ..calibration.trajectories import Trajectories
from ..distributed import Ranks
from ..models.mmdit import MMDiT
from ..models.paths import set_module
from ..models.pipeline import compiling_is_faster
from ..quant.artifacts import (
    BEFORE_REFINING,
    RoundedLayer,
    block_file,
    load_rounded_block,
    save_rounded_block,
)
from ..quant.refining import Rates, Refiner, Tree, Tuned, weights_and_biases, zero_moments
from ..quant.standin import StandIn, StandIns
from ..sampling import guided
from .blocks import (
    full_path,
    own_biases,
    put_rounded,
    stand_in_block,
)
from .plan import Plan

CHECKS = 4  # times that the hard rounding is judged during a run
CHECK_ROWS = 64
WARM_UP = 20  # iterations: Adam's first steps move every code alike
SMALLEST_RATIO = 1e-12  # of error to signal
REFINE_STREAM = 1  # of random numbers: another one than any block's


@dataclass(frozen=True)
class Refined:
    """The best that was met: what the blocks gave, if nothing was better."""

    layers: dict[str, Tuned]
    states: Tree
    history_db: list[float]  # on latents that no iteration saw: at the start, then at every check
    moved: float  # share of codes that refining has changed

    def figures(self) -> dict[str, Any]:
        return {
            "velocity_db": [round(db, 3) for db in self.history_db],
            "kept": max(self.history_db) > self.history_db[0],
            "moved": round(self.moved, 5),
        }


@dataclass(frozen=True)
class NoisedLatents:
    """Draws rows of the finished latents, noised, with their conditioning."""

    latents: mx.array
    text: mx.array  # the prompts' rows, then the negatives'
    pooled: mx.array
    sigmas: np.ndarray  # of the schedule, the last one 0

    @classmethod
    def of(cls, trajectories: Trajectories) -> NoisedLatents:
        images, last = range(trajectories.num_images), trajectories.num_steps
        conditioning = trajectories.conditioning(images, mx.float32)
        latents = mx.array(np.stack([trajectories.latent(image, last) for image in images]))
        sigmas = np.array(trajectories.sigmas, dtype=np.float32)
        return cls(latents, conditioning.text, conditioning.pooled, sigmas)

    def draw(self, rng: np.random.Generator, rows: int) -> Tree:
        image = rng.integers(len(self.latents), size=rows)
        step = rng.integers(len(self.sigmas) - 1, size=rows)
        # Below the last sigma that the model is asked for, there is nothing to learn.
        low = np.maximum(self.sigmas[step + 1], self.sigmas[-2])
        share = rng.uniform(size=rows).astype(np.float32)
        sigma = mx.array(low + share * (self.sigmas[step] - low))
        clean = self.latents[mx.array(image)].astype(mx.float32)
        noise = mx.random.normal(clean.shape, key=mx.random.key(int(rng.integers(2**31))))
        wide = sigma.reshape(-1, 1, 1, 1)
        guidance = len(self.text) // len(self.latents)
        chosen = mx.array(np.concatenate([image + i * len(self.latents) for i in range(guidance)]))
        return {
            "latent": (1 - wide) * clean + wide * noise,
            "sigma": sigma,
            "text": self.text[chosen],
            "pooled": self.pooled[chosen],
        }


def own_rows(batch: Tree, ranks: Ranks) -> Tree:
    """What this rank computes of a minibatch that all ranks have drawn alike."""
    rows = len(batch["latent"])
    own = np.arange(ranks.rank, rows, ranks.size)
    guidance = len(batch["text"]) // rows
    both = mx.array(np.concatenate([own + i * rows for i in range(guidance)]))
    wanted = {"text": both, "pooled": both}
    return {name: array[wanted.get(name, mx.array(own))] for name, array in batch.items()}


@dataclass(frozen=True)
class Start:
    """The model in float32 as the blocks left it; everything by linear path."""

    student: StandIns
    layers: dict[str, Tuned]
    states: Tree
    codes: dict[str, mx.array]

    @classmethod
    def of(cls, plan: Plan) -> Start:
        original = plan.pipeline.transformer
        network = MMDiT(original.config)
        network.update(tree_map(lambda p: p.astype(mx.float32), original.parameters()))
        start = cls(StandIns(network, {}), {}, {}, {})
        for index in plan.blocks:
            block = stand_in_block(original, index, plan.config)
            masters = block.masters()
            rounded = load_rounded_block(plan.folder, index, BEFORE_REFINING)
            put_rounded(block, index, rounded, own_biases(original, index))
            for path, stand_in in block.stand_ins.items():
                full = full_path(index, path)
                set_module(network, full, stand_in)
                start.add(full, stand_in, rounded[full], masters[path], plan.options.bits_w)
            mx.eval(start.states)
        return start

    def add(
        self, path: str, stand_in: StandIn, rounded: RoundedLayer, master: mx.array, bits: int
    ) -> None:
        bias = stand_in.get("bias")
        bias = mx.zeros(len(master)) if bias is None else bias
        self.student.stand_ins[path] = stand_in
        self.layers[path] = Tuned(mx.array(rounded.scale), bias, bits)
        self.codes[path] = mx.array(rounded.codes)
        self.states[path] = self.layers[path].state(master, self.codes[path])


class Network:
    """The rounded network, its teacher, and the error between them."""

    def __init__(self, plan: Plan, student: StandIns) -> None:
        self.student = student
        self.teacher = plan.pipeline.transformer
        self.dtype, self.cfg_weight = plan.pipeline.dtype, plan.trajectories.cfg_weight
        self._velocity = self.exact_velocity
        if compiling_is_faster():
            self._velocity = mx.compile(self.exact_velocity, inputs=self.teacher.state)

    def with_target(self, batch: Tree) -> Tree:
        """The batch, with what the 16-bit model makes of it."""
        batch = batch | {"target": self._velocity(batch)}
        mx.eval(batch)
        return batch

    def exact_velocity(self, batch: Tree) -> mx.array:
        # The pipeline's own precision is the reference that fidelity is measured against.
        return self.velocity(self.teacher, batch, self.dtype)

    def velocity(self, model: nn.Module, batch: Tree, dtype: mx.Dtype) -> mx.array:
        text, pooled = (batch[name].astype(dtype) for name in ("text", "pooled"))
        return guided(model, batch["latent"], batch["sigma"], text, pooled, self.cfg_weight)

    def log_error(self, weights: Tree, biases: Tree, batch: Tree) -> mx.array:
        """Mean over the rows of ln(error / signal) of the guided velocity."""
        self.student.set_weights(weights)
        self.student.set_biases(biases)
        got = self.velocity(self.student.module, batch, mx.float32)
        axes = tuple(range(1, got.ndim))
        error = mx.square(got - batch["target"]).sum(axes)
        return mx.log(error / mx.square(batch["target"]).sum(axes) + SMALLEST_RATIO).mean()

    def decibel(self, layers: dict[str, Tuned], states: Tree, batches: list[Tree]) -> float:
        """Signal to error of the velocity with these states, mean over the batches."""
        both = weights_and_biases(layers, states)
        mx.eval(both)
        errors = [self.log_error(*both, batch).item() for batch in batches]
        return -10 / math.log(10) * sum(errors) / len(errors)


def refine_network(plan: Plan, ranks: Ranks) -> Refined:
    """All iterations, on all ranks alike; the best hard rounding that was met."""
    iters, size = plan.options.refine, plan.options.batch_size
    start = Start.of(plan)
    network, layers, states = Network(plan, start.student), start.layers, start.states
    drawn = NoisedLatents.of(plan.trajectories)
    rng = np.random.default_rng([plan.options.seed, REFINE_STREAM])
    judged = [network.with_target(drawn.draw(rng, size)) for _ in range(-(-CHECK_ROWS // size))]
    refiner = Refiner(layers, network.log_error, compiling_is_faster(), averaged_over(ranks))
    moments, rates = zero_moments(states), Rates()
    best, history = states, [network.decibel(layers, states, judged)]
    checks = {round(iters * (i + 1) / CHECKS) for i in range(CHECKS)}
    for iteration in tqdm(range(iters), desc="refining", unit="step", disable=ranks.rank > 0):
        batch = network.with_target(own_rows(drawn.draw(rng, size), ranks))
        warm = min(1.0, (iteration + 1) / WARM_UP)
        at = rates.at(iteration / iters, iteration, warm)
        states, moments, _ = refiner.step(states, moments, batch, at)
        if iteration + 1 in checks:
            history.append(network.decibel(layers, states, judged))
            if history[-1] == max(history):
                best = states
    moved = sum(
        mx.sum(layer.codes(best[path]) != start.codes[path]).item()
        for path, layer in layers.items()
    )
    return Refined(layers, best, history, moved / sum(c.size for c in start.codes.values()))


def averaged_over(ranks: Ranks) -> Callable[[Tree], Tree]:
    """The mean of all ranks' gradients, the same on each."""

    def averaged(gradients: Tree) -> Tree:
        names = [(kind, path) for kind, own in gradients.items() for path in own]
        # As a list: MLX would take the dots of a linear path for a deeper tree.
        arrays = nn.average_gradients([gradients[kind][path] for kind, path in names])
        found: Tree = {kind: {} for kind in gradients}
        for (kind, path), array in zip(names, arrays, strict=True):
            found[kind][path] = array
        return found

    return averaged if ranks.size > 1 else lambda gradients: gradients


def write_refined(plan: Plan, refined: Refined) -> list[str]:
    """Writes every block's final weights; their names, relative to the folder."""
    names = []
    for index in plan.blocks:
        biases = own_biases(plan.pipeline.transformer, index)
        before = load_rounded_block(plan.folder, index, BEFORE_REFINING)
        prefix = full_path(index, "")
        layers = {
            path: refined_layer(
                layer, refined.layers[path], refined.states[path], biases[path[len(prefix) :]]
            )
            for path, layer in before.items()
        }
        save_rounded_block(plan.folder, index, layers)
        names.append(block_file(index))
    return names


def refined_layer(
    before: RoundedLayer, tuned: Tuned, state: Tree, own_bias: mx.array | None
) -> RoundedLayer:
    """The layer as it is written; a bias moves by as much as the stand-in's did."""
    codes = tuned.codes(state)
    _, bias = tuned.weight_and_bias(state)
    known = before.bias if before.bias is not None else own_bias
    moved = bias - tuned.bias
    written = moved if known is None else mx.array(known).astype(mx.float32) + moved
    return dataclasses.replace(
        before,
        codes=np.array(codes.astype(mx.int8)),
        scale=np.array(tuned.scales(state)),
        bias=np.array(written),
    )


def refined_line(figures: dict[str, Any]) -> str:
    first, best = figures["velocity_db"][0], max(figures["velocity_db"])
    if not figures["kept"]:
        return f"refining: velocity {first:.2f} dB, nothing better was met, kept the blocks' own"
    return (
        f"refining: velocity {first:.2f} to {best:.2f} dB on latents of its own; "
        f"{figures['moved']:.1%} of codes changed"
    )
