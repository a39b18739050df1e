"""What `ditq doctor --sd3` tries out on the user's machine: small, random, a few seconds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map

from ..backends import BACKENDS, Weight
from ..errors import UserError
from ..models.configs import MMDiTConfig
from ..models.mmdit import MMDiT
from ..models.sd3 import random_decoder, velocity_by_diffusionkit
from ..models.sd3_decode import decode_in_strips
from ..models.sd3_files import PUBLISHED, Files, files_of, find_cached
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
    checks = [*versions(), *weights(checkpoint)]
    tests: list[tuple[str, Callable[[], mx.array | float], float]] = [
        *kernel_tests(),
        *transformer_tests(),
    ]
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
    if checkpoint is not None:
        try:
            yield Check(f"{checkpoint}", parts_of(files_of(checkpoint, None)))
        except UserError as error:
            yield Check(f"{checkpoint}", str(error), False)
        return
    for model in PUBLISHED:
        files = find_cached(model)
        yield Check(model, "not downloaded" if files is None else parts_of(files))


def parts_of(files: Files) -> str:
    names = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5", "vae": "VAE"}
    held = ["transformer", *(title for name, title in names.items() if files.part(name))]
    lacking = [title for name, title in names.items() if not files.part(name)]
    lacking += [f"tokenizer of {names[n]}" for n in ("clip_l", "t5") if not files.tokenizer(n)]
    return ", ".join(held) + (f"; without {', '.join(lacking)}" if lacking else "")


def tried(name: str, test: Callable[[], float], limit: float) -> Check:
    """The relative error that a test found, or that it failed."""
    try:
        error = float(test())
    except Exception as problem:  # whatever a machine does to a kernel is what is asked here
        return Check(name, f"{type(problem).__name__}: {' '.join(str(problem).split())}", False)
    return Check(name, f"relative error {error:.1e}, at most {limit:.0e}", error <= limit)


def kernel_tests() -> Iterator[tuple[str, Callable[[], float], float]]:
    """Every backend that runs here, on the same codes as the reference."""
    wanted = multiplied("reference")
    for name in BACKENDS:
        if name != "reference":
            yield (
                f"kernel {name}",
                lambda name=name: relative_error(multiplied(name), wanted),
                ROUNDED,
            )


def multiplied(name: str) -> mx.array:
    """W4A8 codes, multiplied by a backend."""
    key = mx.random.key(0)
    packed = mx.random.randint(0, 2**31 - 1, (OUTPUTS, INPUTS * BITS // 32), key=key)
    scales = mx.random.uniform(0.5, 1.5, (OUTPUTS, 1), key=key) / INPUTS
    weight, limit = (
        Weight(packed.astype(mx.uint32), scales, BITS),
        activation_limit(ACTIVATION_BITS),
    )
    codes = mx.random.randint(-limit, limit + 1, (ROWS, INPUTS), key=key).astype(mx.float32)
    operand = BACKENDS[name].prepare(weight, mx.float32, limit)
    return BACKENDS[name].multiply(codes, mx.array(0.01), operand)


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
