"""What INT8 gives at SD3's size, and what it costs: bytes, memory, time, and nano's pictures.

    python -m tools.bench_int8 [--blocks 24] [--rounds 10] [--captions 64]

Writes docs/benchmarks/int8.json and int8.md, or other names by --report. Bytes, memory and time
are those of a transformer of SD3-medium's shapes with random weights and as many of its blocks as
are asked for, its modulation in 16 bits; a step is guided, and its models take turns, so that a
busy machine is busy for all.
Pictures are nano's. `--no-steps` or `--no-pictures` keeps that part as the last run has written it.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from src.backends import BACKENDS, Device
from src.inference.int8 import WHILE_LOADING, Int8, open_with_int8, share_work
from src.inference.kernels import rows_of
from src.metrics.psnr import psnr
from src.models.configs import MMDiTConfig, config_named
from src.models.load import default_dtype, load_pipeline
from src.models.mmdit import MMDiT
from src.models.pipeline import Conditioning, Defaults, Pipeline
from src.models.prompts import load_prompts
from src.quant.int8 import INT8Linear
from src.quant.int8_operators import AUTO, FALLBACK, KEEPS_UNPACKED
from src.quant.replace import collect_replace_targets, replace_linear_with_int8

import click
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from tools.bench_backends import in_turns
from tools.bench_common import FOLDER, machine, write_report
from tools.synthetic import fill_random

EXACT = "16-bit"
SCHEMES = {"per channel": 0, "blocks of 128": 128}
# Other names, where a weight is a byte, of `unpack`, `fallback` and `cuda_int8`.
LEFT_OUT = (KEEPS_UNPACKED, "reference", "cuda_int8_packed")
KERNELS = {"cuda": "cuda_int8", "metal": "metal_int8"}  # that take others' place elsewhere
GOALS = {"share": 0.52, "peak": 0.80, "time": 1.10, "psnr": 45.0}
DEFAULTS = Defaults(28, 5.0, 3.0, 1024, 1024, 0)
SIGMA = 0.6
SLOW = 4.0  # times the 16-bit step
BATCH = 16


def pipeline_of(transformer: MMDiT) -> Pipeline:
    """A transformer alone, as the stages run it."""
    return Pipeline("synthetic", "", "", None, transformer, None, DEFAULTS, default_dtype())


def step_of(transformer: MMDiT, pixels: int, tokens: int) -> Callable[[], mx.array]:
    """A guided step of one picture, compiled where the stages compile it."""
    config, dtype = transformer.config, default_dtype()
    text = mx.random.normal((2, tokens, config.text_dim), key=mx.random.key(1)).astype(dtype)
    pooled = mx.random.normal((2, config.pooled_dim), key=mx.random.key(2)).astype(dtype)
    shape = (1, pixels // 8, pixels // 8, config.latent_channels)
    latent = mx.random.normal(shape, key=mx.random.key(3))
    mx.eval(text, pooled, latent)
    velocity = pipeline_of(transformer).velocity(Conditioning(text, pooled), DEFAULTS.cfg_weight)
    return lambda: velocity(latent, mx.array(SIGMA))


def peak_of(step: Callable[[], mx.array]) -> dict[str, int]:
    """Bytes that MLX holds between steps, and the most that it held in one: as it runs by itself,
    and where it may not run ahead of what is computed."""
    mx.eval(step())
    gc.collect()
    mx.clear_cache()
    held = mx.get_active_memory()
    peak = peak_once(step)
    limit = mx.set_memory_limit(held)
    try:
        return {"held": held, "peak": peak, "in_order": peak_once(step)}
    finally:
        mx.set_memory_limit(limit)


def peak_once(step: Callable[[], mx.array]) -> int:
    mx.reset_peak_memory()
    mx.eval(step())
    return mx.get_peak_memory()


def int8_model(exact: MMDiT, block_size: int) -> MMDiT:
    """INT8 in the place of the block linears; all else is shared with the 16-bit model."""
    model = MMDiT(exact.config)
    model.load_weights(tree_flatten(exact.parameters()))
    scope, skip = WHILE_LOADING.scope_attr, WHILE_LOADING.skip_keywords
    replace_linear_with_int8(model, scope, True, skip, block_size=block_size, one_by_one=True)
    mx.eval(model.parameters())
    return model


def with_backend(model: MMDiT, backend: str, pixels: int) -> MMDiT:
    """The same codes multiplied in another way, as pictures of that size are drawn; nothing is
    copied."""
    other = MMDiT(model.config)
    layers = [
        (
            path,
            INT8Linear.from_quantized(layer.weight, layer.weight_scale, layer.get("bias"), backend),
        )
        for path, layer in model.named_modules()
        if isinstance(layer, INT8Linear)
    ]
    other.update_modules(tree_unflatten(layers))
    other.load_weights(tree_flatten(model.parameters()))
    rows = rows_of(model.config, replace(DEFAULTS, height=pixels, width=pixels))
    share_work(other, rows, default_dtype())
    return other


def sizes(exact: MMDiT, model: MMDiT) -> dict[str, Any]:
    """Bytes of the converted layers' weights in 16 bits and in INT8, scales included."""
    scope, skip = WHILE_LOADING.scope_attr, WHILE_LOADING.skip_keywords
    targets = collect_replace_targets(exact, scope, skip)
    layers = dict(model.named_modules())
    before = sum(2 * linear.weight.size for linear in targets.values())
    after = sum(layers[p].weight.nbytes + layers[p].weight_scale.nbytes for p in targets)
    return {"layers": len(targets), "16-bit": before, "int8": after, "share": after / before}


def steps(config: MMDiTConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Bytes, memory and time of a step, one scheme after the other."""
    pixels, tokens, rounds = options["pixels"], options["tokens"], options["rounds"]
    exact = MMDiT(config)
    fill_random(exact, default_dtype())
    found: dict[str, Any] = {"dtype": str(default_dtype()), "schemes": {}}
    begun = time.perf_counter()

    def report(what: str) -> None:
        click.echo(f"{time.perf_counter() - begun:.0f} s, {what}", err=True)

    plain = step_of(exact, pixels, tokens)
    found[EXACT] = peak_of(plain)
    for scheme, block_size in SCHEMES.items():
        report(f"{scheme}: quantizing")
        model = int8_model(exact, block_size)
        row: dict[str, Any] = {"sizes": sizes(exact, model), "backends": {}}
        calls = {EXACT: plain}
        for backend in options["backends"]:
            report(f"{scheme}: {backend}")
            step = step_of(with_backend(model, backend, pixels), pixels, tokens)
            try:
                error = relative_error(step(), plain())
                own = peak_of(step)
            except Exception as problem:  # of a backend that this machine or shape does not suit
                row["backends"][backend] = {"refused": " ".join(str(problem).split())[:200]}
                continue
            # Both models are in memory here; what they share counts once.
            others = nbytes_of(exact) - shared_bytes(exact, model)
            own = {key: value - others for key, value in own.items()}
            row["backends"][backend] = {**own, "error": error}
            # One call tells enough of what is far too slow, and turns of it would take minutes.
            first = in_turns({EXACT: plain, backend: step}, 1)
            if first[backend]["ratio"] > SLOW:
                row["backends"][backend].update(first[backend])
            else:
                calls[backend] = step
        report(f"{scheme}: in turns")
        for name, timed in in_turns(calls, rounds).items():
            row["backends"].setdefault(name, {}).update(timed)
        found["schemes"][scheme] = row
        del model, calls
        gc.collect()
        mx.clear_cache()
    return found


def nbytes_of(model: MMDiT) -> int:
    return sum(tensor.nbytes for _, tensor in tree_flatten(model.parameters()))


def shared_bytes(exact: MMDiT, model: MMDiT) -> int:
    """Of the parameters that INT8 leaves as they are."""
    own, others = (dict(tree_flatten(m.parameters())) for m in (exact, model))
    return sum(t.nbytes for name, t in own.items() if others[name].dtype == t.dtype)


def relative_error(got: mx.array, wanted: mx.array) -> float:
    got, wanted = got.astype(mx.float32), wanted.astype(mx.float32)
    return float(mx.linalg.norm(got - wanted) / mx.linalg.norm(wanted))


def pictures(captions: int) -> dict[str, Any]:
    """PSNR in dB of nano's INT8 pictures against its own in 16 bits, float32 on a CPU."""
    prompts = load_prompts("nano_evaluation")
    chosen = [prompts[i % len(prompts)] for i in range(captions)]
    plain = drawn(load_pipeline("nano"), chosen)
    found = drawn(open_with_int8("nano", int8=Int8(use_int8=True)), chosen)
    ratios = [psnr(a, b) for a, b in zip(plain, found, strict=True)]
    return {
        "captions": captions,
        "dtype": str(default_dtype()),
        "median": float(np.median(ratios)),
        "worst": min(ratios),
        "quartile": float(np.percentile(ratios, 25)),
    }


def drawn(pipeline: Pipeline, prompts: list[str]) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    for start in range(0, len(prompts), BATCH):
        rows = range(start, min(start + BATCH, len(prompts)))
        found += list(pipeline.decode(pipeline.sample([prompts[i] for i in rows], list(rows))))
    return found


def lines_of(data: dict[str, Any]) -> list[str]:
    """The report's text; goals stand beside what was found."""
    lines: list[str] = []
    if found := data.get("steps"):
        lines += step_lines(found)
    if found := data.get("pictures"):
        lines += [
            "",
            f"Nano on {found['machine']['device']}, {found['captions']} captions that calibration "
            f"never saw, against {found['dtype'].removeprefix('mlx.core.')}: pictures' median PSNR "
            f"{found['median']:.1f} dB (goal: at least {GOALS['psnr']:.0f}), quartile "
            f"{found['quartile']:.1f}, worst {found['worst']:.1f} "
            f"(`{found['machine']['command']}`).",
        ]
    return lines


def step_lines(found: dict[str, Any]) -> list[str]:
    what = found["model"]
    plain, kind = found[EXACT], found["dtype"].removeprefix("mlx.core.")
    lines = [
        f"{what['config']} with {what['blocks']} of its blocks, random weights, {kind}, on "
        f"{found['machine']['device']}; a guided",
        f"step of {what['pixels']} pixels and {what['tokens']} text tokens. Held is what stays in",
        "memory between steps, peak the most in one, in order the same where MLX waits for memory",
        "instead of running ahead; the time is the median of",
        f"{what['rounds']} turns, the ratio that of each turn's two times; a backend that takes",
        f"more than {SLOW:.0f} times the 16-bit step is timed once.",
        "",
        "| | converted layers, share of 16 bits | held GB | peak GB | peak / 16-bit | in order GB "
        "| in order / 16-bit | ms | time / 16-bit | error of the velocity |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    exact_row = next(iter(found["schemes"].values()))["backends"][EXACT]
    lines.append(
        f"| {EXACT} | | {plain['held'] / 1e9:.3f} | {plain['peak'] / 1e9:.3f} | | "
        f"{plain['in_order'] / 1e9:.3f} | | {1e3 * exact_row['median']:.1f} | | |"
    )
    for scheme, row in found["schemes"].items():
        for name, own in row["backends"].items():
            if name == EXACT:
                continue
            head = f"| {scheme}, {name} | {100 * row['sizes']['share']:.1f} % |"
            if "refused" in own:
                lines.append(f"{head} {own['refused']} | | | | | | | |")
                continue
            lines.append(
                f"{head} {own['held'] / 1e9:.3f} | {own['peak'] / 1e9:.3f} | "
                f"{own['peak'] / plain['peak']:.2f} | {own['in_order'] / 1e9:.3f} | "
                f"{own['in_order'] / plain['in_order']:.2f} | {1e3 * own['median']:.1f} | "
                f"{own['ratio']:.2f} | {own['error']:.4f} |"
            )
    lines += ["", goal_line(found)]
    return lines


def goal_line(found: dict[str, Any]) -> str:
    """Goals and the best backend's figures."""
    rows = [
        (scheme, name, own, row["sizes"]["share"])
        for scheme, row in found["schemes"].items()
        for name, own in row["backends"].items()
        if name != EXACT and "refused" not in own
    ]
    scheme, name, own, share = min(rows, key=lambda row: row[2]["ratio"])
    peak, in_order = (own[key] / found[EXACT][key] for key in ("peak", "in_order"))
    return (
        f"The fastest is {scheme}, {name}: {100 * share:.1f} % of the converted layers' bytes "
        f"(goal: at most {100 * GOALS['share']:.0f} %), {peak:.2f} of the peak (goal: at most "
        f"{GOALS['peak']:.2f}; in order {in_order:.2f}), {own['ratio']:.2f} of the time (goal on "
        f"one H200: at most {GOALS['time']:.2f})."
    )


def earlier(report: str) -> dict[str, Any]:
    """What the last run has written."""
    path = FOLDER / f"{report}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@click.command()
@click.option("--config", "name", default="sd3-medium", help="Whose shapes.")
@click.option("--blocks", type=int, help="How many of its blocks.  [all]")
@click.option("--pixels", default=1024, help="Side of the picture.")
@click.option("--tokens", default=154, help="Of the text.")
@click.option("--rounds", default=10, help="How often each step is timed.")
@click.option("--backends", help="With commas.  [auto, fallback and all that suit]")
@click.option("--captions", default=64, help="Of nano's pictures.")
@click.option("--steps/--no-steps", "with_steps", default=True, help="Bytes, memory and time.")
@click.option("--report", default="int8", help="Name of the files in docs/benchmarks.")
@click.option("--pictures/--no-pictures", "with_pictures", default=True, help="Nano's pictures.")
def main(
    name: str, blocks: int | None, backends: str | None, with_steps: bool, with_pictures: bool,
    captions: int, report: str, **options: Any,
) -> None:  # fmt: skip
    """Measure INT8."""
    config = config_named(name)
    config = replace(
        config,
        depth=blocks or config.depth,
        dual_attention_blocks=min(config.dual_attention_blocks, blocks or config.depth),
    )
    elsewhere = [name for kind, name in KERNELS.items() if kind != Device.here().kind]
    left_out = (*LEFT_OUT, *elsewhere)
    known = [AUTO, *(b for b in BACKENDS if b not in left_out), FALLBACK]
    options["backends"] = known if backends is None else backends.split(",")
    data = {**earlier(report), "machine": machine()}
    if with_steps:
        model = {"config": name, "blocks": config.depth, **options}
        data["steps"] = {"machine": machine(), "model": model, **steps(config, options)}
    if with_pictures:
        data["pictures"] = {"machine": machine(), **pictures(captions)}
    lines = lines_of(data)
    write_report(report, "INT8 at SD3's size", data, lines)
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
