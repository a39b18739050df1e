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

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..store import TensorInfo, require_space, save_tensors, stream_tensors, write_json
from ..store.arrays import dtype_name
from .sd3 import FORMAT, STORED, VERSION, Reading
from .sd3_files import PARTS, TOKENIZERS
from .sd3_text import ACTIVATIONS, SD3Codec, SD3TextEncoder

TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "spiece.model", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json"),
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
    decoder = {
        name: tensor
        for name, tensor in codec.location().tensors().items()
        if name.startswith("decoder.")
    }
    (folder / "vae").mkdir()
    save_tensors(folder / "vae" / "model.safetensors", decoder)


def save_encoder(encoder: SD3TextEncoder, name: str, folder: Path) -> None:
    """One text encoder; its tensors' shapes are known before the first of them is read."""
    folder.mkdir()
    bits, infos, settings = encoder.text.bits, {}, {}
    for reading, tensors in quantized_pieces(encoder, name):
        infos |= {key: info_of(tensor) for key, tensor in tensors.items()}
        stored = reading.bits if bits is None else bits
        settings = {"format": FORMAT, "version": VERSION, "bits": stored}
        settings["shape"] = asdict(reading.shape)
    require_space(folder, sum(info.nbytes for info in infos.values()), f"the {PARTS[name].title}")
    with stream_tensors(folder / "model.safetensors", infos) as writer:
        for _, tensors in quantized_pieces(encoder, name):
            for key in list(tensors):
                writer.write(key, raw(tensors.pop(key)))
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


def raw(tensor: mx.array) -> np.ndarray:
    return np.array(tensor)
