"""What a Stable Diffusion 3 needs in memory, phase after phase, from its shapes.

Each phase has one component in memory: a text encoder, then the transformer, then the VAE. What is
counted is MLX's own memory; Python, MLX and DiffusionKit themselves take some 0.5 GB more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..models.configs import MMDiTConfig, config_named
from ..models.sd3_decode import STRIP_ROWS
from ..models.sd3_load import SD3
from ..models.sd3_names import ClipShape, DecoderShape, T5Shape
from ..models.sd3_text import CLIP_TOKENS, SIDE, T5_TOKENS
from .memory import Layout, other_parameters, resident_bytes
from .memory import linears as linears_of

CLIP_L = ClipShape(12, 768, 12, CLIP_TOKENS, 49408, None)
CLIP_G = ClipShape(32, 1280, 20, CLIP_TOKENS, 49408, 1280)
T5_XXL = T5Shape(24, 4096, 64, 64, 10240, 32128, 32)
VAE = DecoderShape((128, 256, 512, 512), 3, 16)
FLOAT = 4  # bytes
ROWS = 2  # of a batch: the prompt and, for guidance, the negative one
# Arrays of a block's hidden size that are alive together: counted on the forward pass, and checked
# against MLX's own peak.
WIDE = 16
STRIP_COPIES = 6  # of a strip, in float32, while it is normalized and convolved


@dataclass(frozen=True)
class Precision:
    """How a model is kept: 16 bits, or W4A8 with its modulation out of memory."""

    name: str
    layout: Layout | None


SIXTEEN = Precision("16 bit", None)
W4A8 = Precision("W4A8", Layout())
PRECISIONS = (SIXTEEN, W4A8)


def clip_bytes(shape: ClipShape = CLIP_G, width: int = 2) -> int:
    """Of a CLIP's weights, `width` bytes each."""
    size = shape.width
    layer = 12 * size * size + 13 * size
    embeddings = (shape.vocabulary + shape.positions) * size
    return width * (shape.layers * layer + embeddings + 2 * size + (shape.projection or 0) * size)


def t5_bytes(
    shape: T5Shape = T5_XXL, tokens: int = T5_TOKENS, rows: int = ROWS, width: int = 2
) -> int:
    """While T5 runs layer by layer: its token embedding, or one layer and what it computes."""
    embedding = width * shape.vocabulary * shape.width
    attention = 4 * shape.width * shape.heads * shape.head_width
    dense = 3 * shape.width * shape.hidden
    # Behind the first sum everything is in float32, also what is multiplied with it.
    widened = FLOAT * dense if width < FLOAT else 0
    states = rows * FLOAT * tokens * shape.width
    # Scores in their own type, in float32 for the softmax, and its result.
    scores = shape.heads * tokens * tokens * (2 * width + FLOAT)
    hidden = 3 * FLOAT * tokens * shape.hidden
    return max(embedding, width * (attention + dense) + widened + hidden + scores) + 5 * states


def step_bytes(
    config: MMDiTConfig,
    height: int,
    width: int,
    *,
    text_tokens: int = CLIP_TOKENS + T5_TOKENS,
    rows: int = ROWS,
    float_bytes: int = 2,
    fused_attention: bool = True,
) -> int:
    """What one step computes for a while; attention that is not fused keeps its scores."""
    patch = SIDE * config.patch
    tokens = text_tokens + (height // patch) * (width // patch)
    wide = WIDE * rows * tokens * config.hidden
    scores = 0 if fused_attention else rows * config.heads * tokens**2
    text = rows * text_tokens * config.text_dim
    return float_bytes * (text + wide + scores)


def transformer_bytes(
    config: MMDiTConfig, precision: Precision, *, steps: int = 28, float_bytes: int = 2
) -> int:
    """Of the weights that stay from step to step."""
    if precision.layout is not None:
        kept = resident_bytes(
            config, precision.layout, low_memory=True, levels=steps, float_bytes=float_bytes
        )
        return kept.total
    sizes = sum(
        rows * (columns + 1) for path, rows, columns in linears_of(config) if in_block(path)
    )
    return float_bytes * (sizes + other_parameters(config))


def in_block(path: str) -> bool:
    return "_transformer_block." in path or ".adaLN_modulation." in path


def decoder_bytes(height: int, width: int, shape: DecoderShape = VAE, float_bytes: int = 2) -> int:
    """Weights and the largest that decoding in strips holds at a time."""
    return float_bytes * decoder_parameters(shape) + max(
        decoder_layers(height, width, shape, float_bytes)
    )


def decoder_parameters(shape: DecoderShape) -> int:
    """How many numbers a VAE decoder has."""
    top = shape.channels[-1]
    count = 9 * top * shape.latent_channels + 9 * 3 * shape.channels[0]
    count += 2 * 2 * 9 * top * top + 4 * top * top  # the middle
    before = top
    for index, channels in reversed(list(enumerate(shape.channels))):
        for _ in range(shape.resnets):
            count += 9 * channels * (before + channels) + (before != channels) * before * channels
            before = channels
        count += 9 * channels * channels * (index > 0)
    return count


def decoder_layers(height: int, width: int, shape: DecoderShape, float_bytes: int) -> Iterator[int]:
    """Of each resolution: what comes in and what goes out, and the strip in work in float32."""
    before = shape.channels[-1]
    for index, channels in reversed(list(enumerate(shape.channels))):
        rows, columns = height >> index, width >> index
        largest = max(before, channels)
        strip = (STRIP_ROWS * (SIDE >> index) + 2) * columns
        work = STRIP_COPIES * FLOAT * min(strip, rows * columns) * largest
        yield rows * columns * (before + channels) * float_bytes + work
        if index:  # to twice the sides
            yield rows * columns * channels * 5 * float_bytes + 4 * work
        before = channels


@dataclass(frozen=True)
class Phase:
    name: str
    bytes: int


def phases(
    model: str, precision: Precision, height: int, width: int, *, t5: bool = True
) -> list[Phase]:
    """The phases of one picture, each with the most that it needs."""
    config = config_named(model)
    text = CLIP_TOKENS + (T5_TOKENS if t5 else CLIP_TOKENS)
    denoising = transformer_bytes(config, precision)
    denoising += step_bytes(config, height, width, text_tokens=text)
    found = [Phase("CLIP", clip_bytes())]
    if t5:
        found.append(Phase("T5", t5_bytes()))
    return [*found, Phase("denoising", denoising), Phase("VAE", decoder_bytes(height, width))]


def table(sizes: tuple[int, ...] = (512, 1024)) -> list[str]:
    """Markdown: gigabytes of every phase, by model, precision and size."""
    lines = [
        "| model | | picture | CLIP | T5 | denoising | VAE | most |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for model in SD3:
        for precision in PRECISIONS:
            for size in sizes:
                found = phases(model, precision, size, size)
                numbers = [phase.bytes / 1e9 for phase in found]
                shown = " | ".join(f"{n:.1f}" for n in [*numbers, max(numbers)])
                lines.append(f"| {model} | {precision.name} | {size}² | {shown} |")
    return lines
