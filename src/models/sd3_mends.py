"""Lets DiffusionKit 0.5.1 draw on today's MLX, one pipeline object at a time.

Nothing of the installed package changes. `mend` gives a pipeline a class of its own, derived from
the one that it has, and `unmend` takes it away again:

memory   T5 asks Metal for `memory_size`, which no other device has, and leaves a memory limit
attend   with low_memory_mode=True, its default, attention gets an argument that MLX has dropped
report   with verbose=True, its default, the machine is described after decoding; where that fails
         the finished picture is lost
plain    without guidance (cfg_weight=0.0, its default) the text has two rows, the latent one
t5       use_t5=False is heeded when the pipeline is made, and forgotten at the first picture
noise    a seed is given to NumPy's global generator, which is the caller's
file     `local_ckpt` is kept in the package, so the next pipeline's weights get into this one
again    a picture that was cut short leaves a transformer without its modulation, or a T5 without
         its layers
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import UserError
from ..sampling import Noise
from .sd3_versions import check_packages

PACKAGE = "diffusionkit.mlx"


class Mended:
    """Comes before a pipeline's own class."""

    t5 = None  # mend `t5`: the package loads T5 unasked where this name is missing

    def check_and_load_models(self) -> None:
        with own_file(self):
            super().check_and_load_models()

    def load_mmdit(self, only_modulation_dict: bool = False) -> Any:
        with own_file(self):
            found = super().load_mmdit(only_modulation_dict)
        mend_attention(getattr(self, "mmdit", None))
        return found

    def set_up_t5(self) -> None:
        with own_file(self):
            super().set_up_t5()
        mend_t5(self.t5_encoder)

    def generate_image(
        self,
        text: str,
        num_steps: int = 2,
        cfg_weight: float = 0.0,
        negative_text: str = "",
        latent_size: tuple[int, int] = (64, 64),
        seed: int | None = None,
        verbose: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """The package's own; with verbose=True a summary is logged when the picture is safe."""
        options = (num_steps, cfg_weight, negative_text, latent_size, seed, False, *args)
        picture, log = super().generate_image(text, *options, **kwargs)
        if verbose:
            logger = logging.getLogger(PACKAGE)
            for line in summary(log):
                logger.info(line)
        return picture, log

    def encode_text(self, *args: Any, **kwargs: Any) -> tuple[mx.array, mx.array]:
        if self.use_t5 and getattr(self, "t5_encoder", None) is None:
            self.set_up_t5()
        try:
            return super().encode_text(*args, **kwargs)
        finally:
            if self.low_memory_mode:  # mend `again`: its layers are spent
                vars(self).pop("t5_encoder", None)

    def denoise_latents(
        self,
        conditioning: mx.array,
        pooled_conditioning: mx.array,
        num_steps: int = 2,
        cfg_weight: float = 0.0,
        **rest: Any,
    ) -> tuple[mx.array, list[float]]:
        if cfg_weight <= 0:
            conditioning, pooled_conditioning = conditioning[:1], pooled_conditioning[:1]
        try:
            return super().denoise_latents(
                conditioning, pooled_conditioning, num_steps, cfg_weight, **rest
            )
        except BaseException:
            vars(self).pop("mmdit", None)  # mend `again`: the next picture loads it
            raise

    def get_noise(self, seed: int, x_T: mx.array) -> mx.array:
        """The same numbers from a generator of its own."""
        return Noise([seed] * len(x_T)).draw(*x_T.shape[1:])


def mend(pipeline: Any, checkpoint: str | None = None) -> None:
    """Mends a `DiffusionPipeline`; nothing happens to one that is mended.

    `checkpoint` is the file that it was made with (`local_ckpt`), or none for the hub's. Unless
    told, it is taken to be that of the pipeline that was made last.
    """
    check_pipeline(pipeline)
    if isinstance(pipeline, Mended):
        return
    pipeline.ditq_checkpoint = checkpoint or model_io().LOCAl_SD3_CKPT
    put_before(pipeline, Mended)
    mend_attention(getattr(pipeline, "mmdit", None))
    mend_t5(getattr(pipeline, "t5_encoder", None))


def unmend(pipeline: Any) -> None:
    """Gives a mended pipeline back as it was; nothing happens to another."""
    if not isinstance(pipeline, Mended):
        return
    take_away(pipeline, Mended)
    del pipeline.ditq_checkpoint
    for block in attending_blocks(getattr(pipeline, "mmdit", None)):
        if isinstance(block.sdpa, WithoutThreshold):
            block.sdpa = block.sdpa.attend
    layers = getattr(getattr(pipeline, "t5_encoder", None), "encoder", None)
    if isinstance(layers, UnlimitedT5):
        take_away(layers, UnlimitedT5)


@contextmanager
def mended(pipeline: Any, checkpoint: str | None = None) -> Iterator[None]:
    """The same while the context lasts."""
    before = isinstance(pipeline, Mended)
    mend(pipeline, checkpoint)
    try:
        yield
    finally:
        if not before:
            unmend(pipeline)


def check_pipeline(pipeline: Any) -> None:
    """Raises for what is no SD3 pipeline of a DiffusionKit and an MLX that are known."""
    names = [f"{cls.__module__}.{cls.__name__}" for cls in type(pipeline).__mro__]
    if f"{PACKAGE}.DiffusionPipeline" not in names or f"{PACKAGE}.FluxPipeline" in names:
        raise UserError(
            f"a {type(pipeline).__name__} is no Stable Diffusion 3 pipeline; give a "
            f"{PACKAGE}.DiffusionPipeline"
        )
    check_packages()


def model_io() -> ModuleType:
    """The package's module that loads; the pipeline has imported it."""
    return sys.modules[f"{PACKAGE}.model_io"]


@contextmanager
def own_file(pipeline: Any) -> Iterator[None]:
    """What the package reads meanwhile is for this pipeline, not for the one that was made last."""
    module = model_io()
    before = module.LOCAl_SD3_CKPT, module._FLOAT16
    module.LOCAl_SD3_CKPT, module._FLOAT16 = pipeline.ditq_checkpoint, pipeline.float16_dtype
    try:
        yield
    finally:
        module.LOCAl_SD3_CKPT, module._FLOAT16 = before


def put_before(thing: Any, first: type) -> None:
    """Gives an object a class in which `first` comes before its own."""
    thing.__class__ = type(first.__name__, (first, type(thing)), {})


def take_away(thing: Any, first: type) -> None:
    """Undoes `put_before`; what was put before it since must be taken away first."""
    outermost, inner = type(thing).__bases__[:2]
    if outermost is not first:
        raise UserError(f"the pipeline is {outermost.__name__}; undo that first (ditq.eject)")
    thing.__class__ = inner


def summary(log: dict[str, Any]) -> list[str]:
    """What a user wants to know of a picture's making, of all that DiffusionKit measures."""
    names = {"text_encoding": "Text encoder", "denoising": "Denoising", "decoding": "Image decoder"}
    lines = [f"{title}: {log[name]['time']:.1f}s" for name, title in names.items()]
    return [*lines, f"Peak memory: {log['peak_memory']:.1f}GB", f"Total: {log['total_time']:.1f}s"]


class WithoutThreshold:
    """Attention that takes the argument which MLX has dropped, and does without it."""

    def __init__(self, attend: Any) -> None:
        self.attend = attend

    def __call__(self, *, memory_efficient_threshold: int | None = None, **inputs: Any) -> mx.array:
        return self.attend(**inputs)


def attending_blocks(transformer: Any) -> list[Any]:
    """DiffusionKit's blocks with an attention of their own; none of another transformer."""
    blocks = getattr(transformer, "multimodal_transformer_blocks", [])
    return [block for block in blocks if hasattr(block, "sdpa")]


def mend_attention(transformer: Any) -> None:
    for block in attending_blocks(transformer):
        if not isinstance(block.sdpa, WithoutThreshold):
            block.sdpa = WithoutThreshold(block.sdpa)


def mend_t5(encoder: Any) -> None:
    if encoder is not None and not isinstance(encoder.encoder, UnlimitedT5):
        put_before(encoder.encoder, UnlimitedT5)


class UnlimitedT5(nn.Module):
    """Comes before the class of T5's layers: the same sums, and MLX's memory limit stays alone.

    In the low memory mode a layer is let go as soon as it has run, so that one at a time is read.
    """

    def __call__(self, x: mx.array) -> mx.array:
        dtype, tokens = x.dtype, x.shape[1]
        bias = self.relative_attention_bias(tokens, tokens)
        for index in range(len(self.layers)):
            if self.low_memory_mode:
                x = self.layers.pop(0)(x, mask=bias)
                mx.eval(x)
            else:
                x = self.layers[index](x, mask=bias)
        return self.ln(x).astype(dtype)
