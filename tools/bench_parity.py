"""How closely the transformer agrees with the published packages, and what their quirks cost.

    python -m tools.bench_parity

Needs the extras sd3 and parity. Writes docs/benchmarks/parity.json and parity.md.
"""

from __future__ import annotations

from dataclasses import replace

from src.models.embedding import timestep_features
from src.models.sd3 import velocity_by_diffusionkit

import click
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from tests import published_models as published
from tests.helpers import random_inputs, random_model, relative_error
from tests.mmdit_reference import forward
from tools.bench_common import machine, write_report

CONFIGS = {
    "SD3-medium": published.SD3,
    "SD3.5-medium": published.SD35_MEDIUM,
    "SD3.5-large": published.SD35_LARGE,
}
SIZES = [(16, 16), (32, 32), (8, 20)]
TIMESTEPS = [1000.0, 967.0, 250.5, 3.0]


def numpy_forward(model, *inputs) -> np.ndarray:
    weights = {k: np.array(v, dtype=np.float64) for k, v in tree_flatten(model.parameters())}
    return forward(weights, model.config, *(np.array(x, dtype=np.float64) for x in inputs))


def worst(model, reference) -> float:
    """Largest relative error over resolutions and timesteps, batch 2."""
    errors = []
    for size in SIZES:
        inputs = random_inputs(model.config, *size)
        for t in TIMESTEPS:
            time = mx.full((2,), t)
            errors.append(relative_error(model(*inputs, time), reference(model, *inputs, time)))
    return max(errors)


def diffusionkit(model, latent, text, pooled, time):
    return velocity_by_diffusionkit(model, latent, text, pooled, time[0].item())


def parity() -> dict[str, dict[str, float]]:
    """Worst relative error of each shrunken model against each reference that has it."""
    table = {}
    for name, config in CONFIGS.items():
        model = random_model(config)
        torch_model = published.diffusers_model(model)
        row = {
            "NumPy": worst(model, numpy_forward),
            "diffusers": worst(model, lambda _, *x, m=torch_model: published.run_diffusers(m, *x)),
        }
        if not config.dual_attention_blocks:
            exact = published.without_k_bias(random_model(replace(config, gelu="exact")))
            row["DiffusionKit"] = worst(exact, diffusionkit)
        table[name] = row
    return table


def quirks() -> dict[str, float]:
    """What DiffusionKit's departures from the published model cost on these random weights."""
    config = published.SD3
    inputs = (*random_inputs(config, 16, 16), mx.full((2,), 967.0))
    wanted = random_model(config)(*inputs)
    exact_gelu = random_model(replace(config, gelu="exact"))(*inputs)
    no_bias = published.without_k_bias(random_model(config))(*inputs)
    feature_error = {}
    for dtype in (mx.float16, mx.bfloat16):
        half = 128
        frequencies = mx.exp(-mx.log(mx.array(10000)) * mx.arange(half, dtype=dtype) / half)
        phase = mx.array([967.0]).astype(dtype)[:, None] * frequencies.astype(dtype)
        rough = mx.concatenate([mx.cos(phase), mx.sin(phase)], -1).astype(mx.float32)
        exact = timestep_features(mx.array([967.0]), 256)
        feature_error[str(dtype).split(".")[-1]] = float(mx.abs(rough - exact).max())
    return {
        "exact instead of tanh GELU, relative": relative_error(exact_gelu, wanted),
        "k biases (deviation 0.5) dropped, relative": relative_error(no_bias, wanted),
        "timestep features in float16, largest error": feature_error["float16"],
        "timestep features in bfloat16, largest error": feature_error["bfloat16"],
    }


@click.command()
def main() -> None:
    """Compare with NumPy, diffusers and DiffusionKit on shrunken random models."""
    table, costs = parity(), quirks()
    names = ("NumPy", "diffusers", "DiffusionKit")
    lines = [
        "Largest relative error of the velocity, float32, over latents of "
        + ", ".join(f"{h}x{w}" for h, w in SIZES)
        + " and timesteps "
        + ", ".join(f"{t:g}" for t in TIMESTEPS)
        + ", batch 2, random weights that use every path. DiffusionKit is compared with "
        "k biases of zero and the exact GELU, which are its own; it has no SD3.5-medium.",
        "",
        "| model, shrunken | " + " | ".join(names) + " |",
        "|---|---|---|---|",
    ]
    for model, row in table.items():
        cells = (f"{row[n]:.1e}" if n in row else "-" for n in names)
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    lines += ["", "What DiffusionKit does differently costs, on the shrunken SD3-medium:", ""]
    lines += ["| difference | cost |", "|---|---|"]
    lines += [f"| {name} | {cost:.2g} |" for name, cost in costs.items()]
    write_report(
        "parity", "Parity of the transformer", {"machine": machine(), **table, **costs}, lines
    )
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
