"""What `ditq doctor --sd3` tries out on the user's machine: small, random, a few seconds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from ..backends import BACKENDS, Weight
from ..errors import UserError
from ..models.configs import MMDiTConfig
from ..models.mmdit import MMDiT
from ..models.sd3 import random_decoder, velocity_by_diffusionkit
from ..models.sd3_decode import decode_in_strips
from ..models.sd3_files import (
    PUBLISHED,
    TOKENIZERS,
    Files,
    cache_within,
    files_of,
    find_cached,
)
from ..models.sd3_text import relative_error
from ..models.sd3_versions import check_packages
from ..models.synthetic import randomize
from ..quant.grid import activation_limit

PACKAGES = ("mlx", "diffusionkit", "transformers", "huggingface_hub", "torch", "numpy")
SHAPE = MMDiTConfig(depth=2, hidden=128, heads=2, text_dim=96, pooled_dim=48, position_size=32)
SIXTEEN_BITS = {"float16": (mx.float16, 0.01), "bfloat16": (mx.bfloat16, 0.08)}
EXACT, ROUNDED = 2e-5, 2e-3  # of float32; of a product in 16 bits
ROWS, OUTPUTS, INPUTS, BITS, ACTIVATION_BITS = 64, 256, 512, 4, 8
LATENT, CHANNELS = (1, 16, 12, 16), (32, 64, 64, 64)


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    found: str
    passed: bool | None = None  # none: a fact, which cannot fail


def sd3_checks(checkpoint: Path | None = None) -> list[Check]:
    """Versions, files, parity and kernels."""
    checks = [*versions(), *weights(checkpoint), *kernel_checks()]
    tests = [*transformer_tests()]
    if importlib.util.find_spec("diffusionkit") is not None:
        tests += [
            ("transformer against DiffusionKit's, float32", against_diffusionkit, EXACT),
            ("VAE in strips against in one piece, float32", strips_against_whole, EXACT),
        ]
    return [*checks, *(tried(*test) for test in tests)]


def versions() -> Iterator[Check]:
    yield Check("machine", f"{platform.platform()}, Python {platform.python_version()}")
    yield Check("device", str(mx.default_device()))
    for name in PACKAGES:
        try:
            yield Check(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "not installed")
    try:
        check_packages()
        yield Check("versions", "known to work together", True)
    except UserError as error:
        yield Check("versions", str(error), False)


def weights(checkpoint: Path | None) -> Iterator[Check]:
    """Which models and which of their parts are on this machine."""
    cache = None
    if checkpoint is not None:
        cache = cache_within(checkpoint) if checkpoint.is_dir() else None
        if cache is None:
            yield files_check(f"{checkpoint}", lambda: files_of(checkpoint, None))
            return
    for model in PUBLISHED:
        yield files_check(model, lambda model=model: find_cached(model, cache, checkpoint))


def files_check(name: str, find: Callable[[], Files | None]) -> Check:
    """The parts of a model, or which of its files is damaged."""
    try:
        files = find()
        return Check(name, "not downloaded" if files is None else parts_of(files))
    except UserError as error:
        return Check(name, str(error), False)


def parts_of(files: Files) -> str:
    names = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5", "vae": "VAE"}
    lacking = [name for name in names if not files.part(name)]
    held = ["transformer", *(title for name, title in names.items() if name not in lacking)]
    lacking = [names[name] for name in lacking]
    lacking += [f"tokenizer of {names[name]}" for name in TOKENIZERS if not files.tokenizer(name)]
    return ", ".join(held) + (f"; without {', '.join(lacking)}" if lacking else "")


def tried(name: str, test: Callable[[], float], limit: float) -> Check:
    """The relative error that a test found, or that it failed."""
    try:
        error = float(test())
    except Exception as problem:  # whatever a machine does to a kernel is what is asked here
        return failed(name, problem)
    return Check(name, f"relative error {error:.1e}, at most {limit:.0e}", error <= limit)


def failed(name: str, problem: Exception) -> Check:
    return Check(name, f"{type(problem).__name__}: {' '.join(str(problem).split())}", False)


def kernel_checks() -> Iterator[Check]:
    """Every backend on the same codes as the reference; one that leaves its products to another
    on this machine is not tried, and says to which."""
    wanted = multiplied("reference", prepared("reference"))
    for name in BACKENDS:
        if name != "reference":
            yield kernel_check(name, wanted)


def kernel_check(name: str, wanted: mx.array) -> Check:
    title = f"kernel {name}"
    try:
        operand = prepared(name)
    except Exception as problem:  # as in `tried`
        return failed(title, problem)
    if "fallback" in operand:
        return Check(title, f"not used here: {operand['fallback']} instead")
    return tried(title, lambda: relative_error(multiplied(name, operand), wanted), ROUNDED)


def prepared(name: str) -> dict[str, Any]:
    """A backend's operand of random codes."""
    key = mx.random.key(0)
    packed = mx.random.randint(0, 2**31 - 1, (OUTPUTS, INPUTS * BITS // 32), key=key)
    scales = mx.random.uniform(0.5, 1.5, (OUTPUTS, 1), key=key) / INPUTS
    weight = Weight(packed.astype(mx.uint32), scales, BITS)
    return BACKENDS[name].prepare(weight, mx.float32, activation_limit(ACTIVATION_BITS))


def multiplied(name: str, operand: dict[str, Any]) -> mx.array:
    """W4A8 codes, multiplied by a backend."""
    limit = activation_limit(ACTIVATION_BITS)
    codes = mx.random.randint(-limit, limit + 1, (ROWS, INPUTS), key=mx.random.key(0))
    return BACKENDS[name].multiply(codes.astype(mx.float32), mx.array(0.01), operand)


def transformer_tests() -> Iterator[tuple[str, Callable[[], float], float]]:
    for name, (dtype, limit) in SIXTEEN_BITS.items():
        yield f"transformer in {name}", lambda dtype=dtype: against_float32(dtype), limit


def random_transformer(config: MMDiTConfig = SHAPE) -> MMDiT:
    model = MMDiT(config)
    randomize(model)
    return model


def inputs() -> tuple[mx.array, mx.array, mx.array]:
    shapes = ((2, 16, 16, SHAPE.latent_channels), (2, 5, SHAPE.text_dim), (2, SHAPE.pooled_dim))
    return tuple(mx.random.normal(shape, key=mx.random.key(1)) for shape in shapes)


def against_float32(dtype: mx.Dtype) -> float:
    """A transformer in 16 bits beside itself in float32, with a QK norm."""
    model, timestep = random_transformer(replace(SHAPE, qk_norm=True)), mx.array([967.0, 31.5])
    wanted = model(*inputs(), timestep)
    mx.eval(wanted)
    model.update(tree_map(lambda tensor: tensor.astype(dtype), model.parameters()))
    return relative_error(model(*(x.astype(dtype) for x in inputs()), timestep), wanted)


def against_diffusionkit() -> float:
    """Ours and DiffusionKit's, with its GELU and without the k biases that it drops."""
    model, timestep = random_transformer(replace(SHAPE, gelu="exact")), 967.0
    for block in model.multimodal_transformer_blocks:
        for stream in (block.image_transformer_block, block.text_transformer_block):
            stream.attn.k_proj.bias = mx.zeros_like(stream.attn.k_proj.bias)
    ours = model(*inputs(), mx.full((2,), timestep))
    return relative_error(ours, velocity_by_diffusionkit(model, *inputs(), timestep))


def strips_against_whole() -> float:
    decoder = random_decoder(CHANNELS)
    latent = mx.random.normal(LATENT, key=mx.random.key(2))
    return relative_error(decode_in_strips(decoder, latent), decoder(latent))


def markdown(checks: list[Check]) -> list[str]:
    """A table to paste into a bug report."""
    marks = {True: "ok", False: "FAILED", None: ""}
    rows = [f"| {c.name} | {c.found.replace('|', '/')} | {marks[c.passed]} |" for c in checks]
    return ["| check | found | |", "|---|---|---|", *rows]
