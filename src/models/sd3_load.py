"""Stable Diffusion 3 and 3.5 as pipelines around our own transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ..errors import UserError
from ..store import hash_arrays, hash_json
from .checkpoints import Fill, fill_published, infer_config, read_weights
from .configs import MMDiTConfig
from .mmdit import MMDiT
from .pipeline import Defaults, Pipeline
from .sd3_download import download_transformer
from .sd3_files import PUBLISHED, Files, files_of, find_cached
from .sd3_text import SIDE, SD3Codec, SD3TextEncoder, Text

SD3 = tuple(PUBLISHED)
DEFAULTS = {
    "sd3-medium": Defaults(50, 7.5, 3.0, 1024, 1024, 50),
    "sd3.5-medium": Defaults(40, 4.5, 3.0, 1024, 1024, 50),
    "sd3.5-large": Defaults(28, 3.5, 3.0, 1024, 1024, 50),
}
PROMPTS = "sd3"
SAMPLED = 1024  # values of a tensor that its fingerprint reads


def load_sd3(
    model: str | None,
    dtype_of: Callable[[str], mx.Dtype],
    checkpoint: Path | None = None,
    text: Text | None = None,
    fill_transformer: Fill = fill_published,
) -> Pipeline:
    """The model of that name, from a checkpoint on this machine or the hub.

    Without a name, a checkpoint's tensors tell which it is. The weights are not read yet.
    `fill_transformer` puts them into the transformer, before any is read or cast.
    """
    files = find_files(model, checkpoint)
    config = infer_config(read_weights(files.transformer), files.transformer)
    name = family(config)
    if model is not None and name != model:
        raise UserError(f"{files.transformer} is {name}, not {model}; give --model {name}")
    transformer, dtype = MMDiT(config), dtype_of(name)
    fill_transformer(transformer, files.transformer)
    transformer.set_dtype(dtype)
    return assemble_sd3(name, fingerprint(files.transformer), transformer, files, dtype, text)


def assemble_sd3(
    name: str,
    hash: str,
    transformer: MMDiT,
    files: Files,
    dtype: mx.Dtype,
    text: Text | None = None,
    defaults: Defaults | None = None,
) -> Pipeline:
    """A pipeline around a transformer; the other parts are read from the files when needed."""
    if defaults is None:
        largest = SIDE * transformer.config.patch * transformer.config.position_size
        size = min(DEFAULTS[name].height, largest)
        defaults = replace(DEFAULTS[name], height=size, width=size)
    return Pipeline(
        name,
        hash,
        PROMPTS,
        SD3TextEncoder(files, dtype, text or Text(), transformer.config.pooled_dim),
        transformer,
        SD3Codec(files, dtype, transformer.config.latent_channels),
        defaults,
        dtype,
    )


def find_files(model: str | None, checkpoint: Path | None) -> Files:
    """On this machine; what the hub alone has is downloaded."""
    if checkpoint is not None:
        return files_of(checkpoint, model)
    if found := find_cached(model):
        return found
    return download_transformer(model)


def family(config: MMDiTConfig) -> str:
    """Which of the published models has a transformer of this kind."""
    if config.dual_attention_blocks:
        return "sd3.5-medium"
    return "sd3.5-large" if config.qk_norm else "sd3-medium"


def fingerprint(path: Path) -> str:
    """The hash of every tensor's shape and some of its values, the same for every layout.

    All layouts of one model must count as the same, so it is of tensors and not of files; a value
    in so many is enough, since what changes a model changes whole tensors.
    """
    hashes, weights = {}, read_weights(path)
    for name in sorted(weights):
        tensor = weights.pop(name)
        flat = tensor.reshape(-1)
        some = flat[:: max(1, flat.size // SAMPLED)].astype(mx.float32)
        hashes[name] = [list(tensor.shape), hash_arrays({name: some})]
        del tensor, flat, some
    mx.clear_cache()
    return hash_json(hashes)
