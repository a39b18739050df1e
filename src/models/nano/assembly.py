"""Puts nano's parts together, trained (a folder) or random (`tiny`, for tests and first steps)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ...errors import UserError
from ...store import hash_arrays, hash_file, hash_json, load_tensors, read_json
from ..checkpoints import Fill, fill
from ..configs import MMDiTConfig, config_named
from ..mmdit import MMDiT
from ..pipeline import Conditioning, Defaults, Pipeline
from ..synthetic import randomize
from .captions import tokenize
from .codec import Codec, CodecConfig
from .text import TextConfig, TextEncoder

FORMAT, VERSION = "ditq-pipeline", 1
PARTS = ("transformer", "text_encoder", "codec")
DEFAULTS = Defaults(
    num_steps=30, cfg_weight=4.0, shift=3.0, height=128, width=128, calibration_images=16
)
PROMPTS = "nano"

Settings = TypeVar("Settings")


def fill_from_file(module: nn.Module, path: Path) -> None:
    fill(module, load_tensors(path), path)


def load_folder_pipeline(
    folder: Path, dtype: mx.Dtype, fill_transformer: Fill = fill_from_file
) -> Pipeline:
    """The pipeline whose config.json and tensors lie in the folder.

    `fill_transformer` puts the tensors into the transformer, before any is read or cast.
    """
    config = read_json(folder / "config.json", format=FORMAT, version=VERSION)
    modules = (
        MMDiT(MMDiTConfig.from_dict(part(config, "transformer", folder))),
        TextEncoder(settings(TextConfig, part(config, "text_encoder", folder), folder)),
        Codec(settings(CodecConfig, part(config, "codec", folder), folder)),
    )
    hashes = {}
    for name, module in zip(PARTS, modules, strict=True):
        path = folder / f"{name}.safetensors"
        put = fill_transformer if name == "transformer" else fill_from_file
        put(module, path)
        hashes[name] = hash_file(path)
    defaults = settings(Defaults, part(config, "sampling", folder), folder)
    name = str(config.get("name", folder.name))
    return assemble(name, hash_json(hashes), *modules, defaults, dtype)


def tiny_pipeline(dtype: mx.Dtype, name: str = "tiny") -> Pipeline:
    """Random weights, the same each time: it draws noise, but through every part."""
    parts = tiny_parts(name)
    hashes = [hash_arrays(dict(tree_flatten(module.parameters()))) for module in parts]
    return assemble(name, hash_json(hashes), *parts, DEFAULTS, dtype)


def tiny_parts(name: str) -> tuple[MMDiT, TextEncoder, Codec]:
    """Transformer, text encoder and codec of a tiny random model."""
    transformer = MMDiT(config_named(name))
    text = TextEncoder(TextConfig(dim=transformer.config.text_dim, layers=1))
    codec = Codec(CodecConfig(quarter=16, eighth=32, quarter_blocks=1, edge=8))
    for module in (transformer, text, codec):
        randomize(module)
    return transformer, text, codec


def assemble(
    name: str,
    hash: str,
    transformer: MMDiT,
    text: TextEncoder,
    codec: Codec,
    defaults: Defaults,
    dtype: mx.Dtype,
) -> Pipeline:
    """A pipeline that computes in dtype; what runs once a picture keeps to float32."""
    transformer.set_dtype(dtype)
    text.set_dtype(mx.float32)
    codec.set_dtype(mx.float32)
    encode = CaptionEncoder(text, dtype)
    return Pipeline(name, hash, PROMPTS, encode, transformer, codec, defaults, dtype)


@dataclass(frozen=True)
class CaptionEncoder:
    """From captions to what the transformer takes."""

    encoder: TextEncoder
    dtype: mx.Dtype

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        text, pooled = self.encoder(mx.array(tokenize(prompts)))
        return Conditioning(text.astype(self.dtype), pooled.astype(self.dtype))

    def each(self, batches: Sequence[Sequence[str]]) -> list[Conditioning]:
        return [self(prompts) for prompts in batches]

    def tokens(self) -> int:
        return self.encoder.config.max_words

    def check(self, prompts: Sequence[str]) -> None:
        tokenize(prompts)

    def settings(self) -> dict[str, Any]:
        return {}


def part(config: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    if not isinstance(config.get(name), dict):
        raise UserError(f"{folder / 'config.json'} has no settings of the {name}")
    return config[name]


def settings(kind: Callable[..., Settings], data: dict[str, Any], folder: Path) -> Settings:
    try:
        return kind(**data)
    except TypeError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
