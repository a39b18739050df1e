"""What quantized transformers take on disk and in memory.

    python -m tools.bench_memory [--measure sd3-medium]

Writes docs/benchmarks/memory.json and memory.md: figures from the shapes for three models and, for
those to be measured, of a real folder with random weights that is saved, opened again and run for
two prompts. Rounding does not change sizes, so codes are the nearest ones.
"""

from __future__ import annotations

import gc
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from src.backends import named
from src.inference.export import save_transformer
from src.inference.low_memory import low_memory
from src.inference.memory import Bytes, Layout, disk_bytes, resident_bytes
from src.inference.modulation import quantize_modulation
from src.inference.saved import load_saved_transformer, reread_saved
from src.models.configs import config_named
from src.models.load import default_dtype
from src.models.mmdit import MMDiT
from src.models.paths import MODULATION
from src.models.pipeline import Conditioning, Defaults, Pipeline
from src.models.synthetic import randomize
from src.quant.artifacts import LayerConfig
from src.quant.linear import QuantizedLinear, Runtime
from src.quant.schedule import Schedule, Step
from src.sampling import sd3_sigmas

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from tools.bench_common import machine, write_report

KERNEL = "quantized_matmul"  # which keeps weights packed on a Mac
NAMES = ("sd3-medium", "sd3.5-medium", "sd3.5-large")
LAYOUT = Layout(steps=28)
SIGMAS = tuple(float(s) for s in sd3_sigmas(LAYOUT.steps)[:-1])
OTHERS = (
    *("x_embedder", "x_pos_embedder", "y_embedder", "t_embedder", "context_embedder"),
    "final_layer",
)
DEFAULTS = Defaults(28, 5.0, 3.0, 1024, 1024, 0)
WHERE = ("codes", "scales", "modulation", "embedders", "vectors", "total")


def from_shapes(name: str) -> dict[str, dict[str, int]]:
    """All figures of one model; floats are 16 bits wide in memory, as on a GPU."""
    config = config_named(name)
    parameters = sum(tensor.size for _, tensor in tree_flatten(MMDiT(config).parameters()))
    return {
        "16-bit model": {"total": 2 * parameters},
        "disk": table_row(disk_bytes(config, LAYOUT)),
        "resident": table_row(resident_bytes(config, LAYOUT, low_memory=False)),
        "resident, low memory": table_row(resident_bytes(config, LAYOUT, low_memory=True)),
    }


def table_row(found: Bytes) -> dict[str, int]:
    return {key: getattr(found, key) for key in WHERE}


def synthetic(name: str) -> MMDiT:
    """A quantized transformer of random 16-bit weights; no more than one block is ever there in
    floats, but for its modulation."""
    model, step = MMDiT(config_named(name)), Step(Schedule(SIGMAS))
    model.follow(step)
    runtime = Runtime(step, backend=named(KERNEL))
    blocks = model.multimodal_transformer_blocks
    parts = [*blocks, *(model[part] for part in OTHERS)]
    with click.progressbar(list(enumerate(parts)), label="making weights") as bar:
        for seed, part in bar:
            randomize(part, seed)
            part.update(tree_map(sixteen_bit, part.parameters()))
            if seed < len(blocks):
                part.update_modules(tree_unflatten(quantized_linears(part, runtime)))
            mx.eval(part.parameters())
    quantize_modulation(model)
    return model


def sixteen_bit(tensor: mx.array) -> mx.array:
    """Values that a 16-bit checkpoint could hold, in what the machine computes in."""
    return tensor.astype(mx.float16).astype(default_dtype())


def quantized_linears(block: nn.Module, runtime: Runtime) -> list[tuple[str, QuantizedLinear]]:
    """All linears of a block but its modulation, fc2 with a shift."""
    layers = []
    for path, linear in block.named_modules():
        if not isinstance(linear, nn.Linear) or MODULATION in path:
            continue
        shift = np.full(linear.weight.shape[1], 0.1, np.float32) if path.endswith("fc2") else None
        grid = LayerConfig([8] * LAYOUT.steps, [0.05] * LAYOUT.steps, shift)
        layers.append((path, QuantizedLinear.from_linear(linear, grid=grid, runtime=runtime)))
        mx.eval(layers[-1][1].parameters())
    return layers


def measured(name: str, pixels: int, tokens: int, scratch: Path) -> dict[str, Any]:
    """A real folder's bytes, and what MLX holds while it is run."""
    folder = scratch / name
    save_transformer(synthetic(name), folder, made_from={"model": f"{name}, random weights"})
    gc.collect()
    mx.clear_cache()
    found: dict[str, Any] = {
        "pixels": pixels,
        "tokens": tokens,
        "dtype": str(default_dtype()),
        "disk": sum(path.stat().st_size for path in folder.iterdir()),
    }
    for low in (True, False):
        found["resident, low memory" if low else "resident"] = run(
            name, folder, pixels, tokens, low
        )
    return found


def run(name: str, folder: Path, pixels: int, tokens: int, low: bool) -> dict[str, Any]:
    """Two prompts, a step of each; what is held after the steps, and the most there ever was."""
    config, dtype = config_named(name), default_dtype()
    side = pixels // 8
    latent = mx.zeros((1, side, side, config.latent_channels))
    text = mx.zeros((2, tokens, config.text_dim), dtype=dtype)
    conditioning = Conditioning(text, mx.zeros((2, config.pooled_dim), dtype=dtype))
    mx.eval(latent, conditioning.text, conditioning.pooled)
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before, start = mx.get_active_memory(), time.perf_counter()
    transformer = load_saved_transformer(folder, kernel=KERNEL)
    pipeline = Pipeline(name, "", "", None, transformer, None, DEFAULTS, dtype)
    held = []
    with low_memory(pipeline, reread_saved(folder)) if low else nullcontext():
        for _ in range(2):
            velocity = pipeline.velocity(conditioning, DEFAULTS.cfg_weight, SIGMAS, compiled=False)
            mx.eval(velocity(latent, mx.array(SIGMAS[3])))
            gc.collect()
            held.append(mx.get_active_memory() - before)
            del velocity
        peak = mx.get_peak_memory() - before
    return {"bytes": max(held), "peak": peak, "seconds": time.perf_counter() - start}


def lines_of(data: dict[str, Any]) -> list[str]:
    """The report's text."""
    lines = [
        "Decimal GB, from the shapes: 4-bit block linears with one float32 scale an output",
        "channel, on disk repeated for MLX's groups of 128; 8-bit modulation in groups of",
        f"{LAYOUT.modulation_group}; activation tables of {LAYOUT.steps} steps. Resident is what",
        f"stays from step to step with the kernel `{KERNEL}`, floats in 16 bits, two rows of",
        "guidance; embedders are all layers that stay in 16 bits, vectors biases and tables.",
        "",
        "| | " + " | ".join(WHERE) + " |",
        "|---" * (len(WHERE) + 1) + "|",
    ]
    for name, rows in data["shapes"].items():
        for what, row in rows.items():
            cells = (f"{row[key] / 1e9:.3f}" if key in row else "" for key in WHERE)
            lines.append(f"| {name}, {what} | {' | '.join(cells)} |")
    for name, found in data["measured"].items():
        lines += ["", f"Measured on a {name} of random weights, {found['dtype']}:", ""]
        lines.append(f"- folder: {found['disk'] / 1e9:.3f} GB")
        for what in ("resident", "resident, low memory"):
            row = found[what]
            lines.append(
                f"- {what}: {row['bytes'] / 1e9:.3f} GB after a step, at most "
                f"{row['peak'] / 1e9:.3f} GB while opening, computing modulation and in a step of "
                f"{found['pixels']} pixels and {found['tokens']} text tokens"
            )
    return lines


@click.command()
@click.option("--measure", multiple=True, help="Also save and run this model. Repeat for more.")
@click.option("--pixels", default=32, help="Side of the picture for what is measured.")
@click.option("--tokens", default=8, help="Of its text; SD3 has 154 and more.")
@click.option("--scratch", help="Folder for the saved models.  [a temporary one]")
def main(measure: tuple[str, ...], pixels: int, tokens: int, scratch: str | None) -> None:
    """Tabulate and measure disk and memory."""
    data = {"machine": machine(), "shapes": {name: from_shapes(name) for name in NAMES}}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        data["measured"] = {name: measured(name, pixels, tokens, Path(folder)) for name in measure}
    lines = lines_of(data)
    write_report("memory", "Disk and memory", data, lines)
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
