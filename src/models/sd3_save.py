"""Writes what a Stable Diffusion 3 has beside its transformer, one folder a component.

text_encoder/, text_encoder_2/, text_encoder_3/   DiffusionKit's names, quantized where asked for
tokenizer/, tokenizer_2/, tokenizer_3/            copies
vae/                                              the decoder, under the names that it came with
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..store import TensorInfo, save_tensors, stream_tensors, write_json
from ..store.arrays import dtype_name
from .sd3 import FORMAT, STORED, VERSION, Reading
from .sd3_files import PARTS, TOKENIZERS
from .sd3_text import ACTIVATIONS, SD3Codec, SD3TextEncoder

TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "spiece.model", "tokenizer.json"),
    # Without a class in the tokenizer's own settings the model's tell which it is.
    *("tokenizer_config.json", "special_tokens_map.json", "config.json"),
)


def save_companions(encoder: SD3TextEncoder, codec: SD3Codec, folder: Path) -> None:
    """Encoders, tokenizers and VAE into the folder; no encoder is in memory as a whole."""
    for name in encoder.parts():
        save_encoder(encoder, name, folder / PARTS[name].places[0])
        source = encoder.tokenizer(name)
        target = folder / TOKENIZERS[name][0][0]
        target.mkdir()
        for file in TOKENIZER_FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, target / file)
    (folder / "vae").mkdir()
    save_tensors(folder / "vae" / "model.safetensors", decoder_of(codec))


def companion_bytes(encoder: SD3TextEncoder, codec: SD3Codec) -> int:
    """Of all weights that `save_companions` writes, none of which is read for it."""
    encoders = [info for name in encoder.parts() for info in described(encoder, name)[0].values()]
    return sum(tensor.nbytes for tensor in [*encoders, *decoder_of(codec).values()])


def decoder_of(codec: SD3Codec) -> dict[str, mx.array]:
    tensors = codec.location().tensors()
    return {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}


def described(encoder: SD3TextEncoder, name: str) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """An encoder's tensors as they will be written, and its config.json; nothing is read."""
    infos, settings = {}, {}
    for reading, tensors in quantized_pieces(encoder, name):
        infos |= {key: info_of(tensor) for key, tensor in tensors.items()}
        bits = reading.bits if encoder.text.bits is None else encoder.text.bits
        settings = {"format": FORMAT, "version": VERSION, "bits": bits}
        settings["shape"] = asdict(reading.shape)
    return infos, settings


def save_encoder(encoder: SD3TextEncoder, name: str, folder: Path) -> None:
    """One text encoder; its tensors' shapes are known before the first of them is read."""
    folder.mkdir()
    infos, settings = described(encoder, name)
    with stream_tensors(folder / "model.safetensors", infos) as writer:
        for _, tensors in quantized_pieces(encoder, name):
            for key in list(tensors):
                writer.write(key, np.array(tensors.pop(key)))
            mx.clear_cache()
    write_json(folder / "config.json", settings)


def quantized_pieces(
    encoder: SD3TextEncoder, name: str
) -> Iterator[tuple[Reading, dict[str, mx.array]]]:
    """The encoder's tensors, not computed yet, some at a time."""
    with Reading(encoder.location(name), STORED) as reading:
        for prefix, module in pieces(reading, name):
            reading.quantize(module, encoder.text.bits)
            named = tree_flatten(module.parameters())
            yield reading, {prefix + key: tensor for key, tensor in named}


def pieces(reading: Reading, name: str) -> Iterator[tuple[str, nn.Module]]:
    """An encoder's modules and the prefixes of their tensors' names."""
    if name in ACTIVATIONS:
        yield "", reading.clip(ACTIVATIONS[name])
        return
    for stage in reading.t5_stages(1):
        yield stage.prefix, stage.layer


def info_of(tensor: mx.array) -> TensorInfo:
    return TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape), tensor.nbytes)
