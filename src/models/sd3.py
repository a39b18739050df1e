"""DiffusionKit's text encoders, tokenizers and VAE, filled from any published layout.

The only file that imports DiffusionKit, and not before a text is encoded or a latent decoded: what
needs the transformer alone runs without it. DiffusionKit's classes are taken, its loaders are not:
they ask the hub again and again, and let a missing tensor pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..errors import UserError
from ..store import read_json
from ..store.files import damaged, one_line
from ..store.jsonfile import check_header
from .checkpoints import fill
from .mmdit import MMDiT
from .sd3_files import Location
from .sd3_names import ClipShape, T5Shape, clip_tensors, decoder_tensors, t5_tensors

WIDTH = 4096  # of a text token
TEXT_BITS = (4, 8)  # of encoders that are quantized
TEXT_GROUP = 64  # columns that share a scale where encoders are quantized
STORED = mx.float16  # the encoders as published
FORMAT, VERSION = "ditq-text-encoder", 1
NO_PROJECTION = ("projection", None)  # of a CLIP whose pooled text stays as it is


@dataclass
class Stage:
    """A layer of T5 as a function of the states before it."""

    prefix: str  # of its tensors' names
    layer: nn.Module
    call: Callable[[mx.array], mx.array]

    def __call__(self, states: mx.array) -> mx.array:
        return self.call(states)


@dataclass
class Reading:
    """One encoder's tensors while they are needed."""

    location: Location
    dtype: mx.Dtype
    tensors: dict[str, mx.array] = field(default_factory=dict)
    bits: int | None = None  # that it is stored with
    shape: ClipShape | T5Shape | None = None  # once it is known

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *error: object) -> None:
        self.tensors.clear()

    def _read(self, mapping: Callable[[dict[str, mx.array], Path], Any], kind: type) -> Any:
        """Tensors under DiffusionKit's names, and their shape."""
        self.tensors, self.bits, self.shape = read_encoder(self.location, mapping, kind)
        return self.shape

    def _fill(self, module: nn.Module, prefix: str = "") -> None:
        """Gives the module its tensors, which are then this object's no more."""
        names = [name for name in self.tensors if name.startswith(prefix)]
        own = {name.removeprefix(prefix): self.tensors.pop(name) for name in names}
        if self.bits is not None:
            quantize_linears(
                module, self.bits, {n.rpartition(".")[0] for n in own if ".scales" in n}
            )
        own = {n: t if t.dtype == mx.uint32 else t.astype(self.dtype) for n, t in own.items()}
        fill(module, own, self.location.path)

    def clip(self, activation: str) -> nn.Module:
        """DiffusionKit's CLIP with its weights, not read yet."""
        from diffusionkit.mlx.clip import CLIPTextModel
        from diffusionkit.mlx.config import CLIPTextModelConfig

        shape: ClipShape = self._read(clip_tensors, ClipShape)
        model = CLIPTextModel(
            CLIPTextModelConfig(
                num_layers=shape.layers,
                model_dims=shape.width,
                num_heads=shape.heads,
                max_length=shape.positions,
                vocab_size=shape.vocabulary,
                projection_dim=shape.projection,
                hidden_act=activation,
            )
        )
        self._fill(model)
        return model

    def t5_stages(self, length: int) -> Iterator[Stage]:
        """T5 from its token embedding to its last norm, one layer after the other.

        DiffusionKit's encoder as a whole sets the machine's memory limit on every call.
        """
        from diffusionkit.mlx.t5 import RelativePositionBias, RMSNorm, TransformerEncoderLayer
        from transformers import T5Config

        shape: T5Shape = self._read(t5_tensors, T5Shape)
        config = T5Config(
            vocab_size=shape.vocabulary,
            d_model=shape.width,
            d_kv=shape.head_width,
            d_ff=shape.hidden,
            num_layers=shape.layers,
            num_heads=shape.heads,
            relative_attention_num_buckets=shape.buckets,
            feed_forward_proj="gated-gelu",
        )
        if shape.width != WIDTH:
            raise UserError(f"{self.location.path}: T5 is {shape.width} wide, not {WIDTH}")
        embedding = nn.Embedding(shape.vocabulary, shape.width)
        self._fill(embedding, "wte.")
        yield Stage("wte.", embedding, embedding)
        del embedding
        positions = RelativePositionBias(config, bidirectional=True)
        self._fill(positions, "encoder.relative_attention_bias.")
        bias = positions(length, length)
        yield Stage("encoder.relative_attention_bias.", positions, lambda states: states)
        for index in range(shape.layers):
            layer = TransformerEncoderLayer(config)
            self._fill(layer, f"encoder.layers.{index}.")
            yield Stage(
                f"encoder.layers.{index}.",
                layer,
                lambda states, layer=layer: layer(states, bias),
            )
            del layer
        norm = RMSNorm(shape.width, eps=config.layer_norm_epsilon)
        self._fill(norm, "encoder.ln.")
        yield Stage("encoder.ln.", norm, lambda states: norm(states).astype(self.dtype))
        if self.tensors:
            raise UserError(f"{self.location.path}: tensor {min(self.tensors)} is not T5's")

    def quantize(self, module: nn.Module, bits: int | None) -> None:
        """In groups, unless it is stored so."""
        if bits is not None and self.bits not in (None, bits):
            raise UserError(
                f"{self.location.path} is stored at {self.bits} bits; leave out "
                f"--quantize-text-encoders {bits}"
            )
        if bits is not None and self.bits is None:
            # As published and as it is saved, so that both give the same codes and scales.
            module.set_dtype(STORED)
            quantize_linears(module, bits)
            module.set_dtype(self.dtype)


def read_encoder(
    location: Location, mapping: Callable[[dict[str, mx.array], Path], Any], kind: type
) -> tuple[dict[str, mx.array], int | None, Any]:
    """An encoder's tensors under DiffusionKit's names, not read yet, the bits that it is stored
    with, and its shape."""
    path, tensors = location.path, location.tensors()
    settings = path / "config.json"
    stored = read_json(settings) if path.is_dir() and settings.is_file() else {}
    if stored.get("format") != FORMAT:
        named, shape = mapping(tensors, path)
        return named, None, shape
    check_header(settings, stored, FORMAT, VERSION)
    return tensors, *stored_shape(settings, stored, kind)


def stored_shape(path: Path, stored: dict[str, Any], kind: type) -> tuple[int | None, Any]:
    """The bits and the shape that the settings of an encoder of our own tell."""
    shape, names = stored.get("shape"), {field.name for field in fields(kind)}
    if not isinstance(shape, dict) or shape.keys() != names:
        raise damaged(path, f"its shape must tell {', '.join(sorted(names))}")
    numbers = {name: value for name, value in shape.items() if (name, value) != NO_PROJECTION}
    if not all(type(value) is int and value > 0 for value in numbers.values()):
        raise damaged(path, "its shape must be of whole numbers above 0")
    if stored.get("bits", 0) not in (None, *TEXT_BITS):
        raise damaged(path, f"its bits must be null, {' or '.join(map(str, TEXT_BITS))}")
    return stored["bits"], kind(**shape)


def quantize_linears(module: nn.Module, bits: int, paths: set[str] | None = None) -> None:
    """The module's linears, or those with these paths."""
    nn.quantize(
        module,
        TEXT_GROUP,
        bits,
        class_predicate=lambda path, layer: (
            isinstance(layer, nn.Linear)
            and layer.weight.shape[1] % TEXT_GROUP == 0
            and (paths is None or path in paths)
        ),
    )


PUBLISHED_TOKENS, PUBLISHED_MERGES = 49408, 48894  # of CLIP's tokenizer
MARKS = ("<|startoftext|>", "<|endoftext|>")


def clip_tokenizer(folder: Path, pad_with_eos: bool) -> Any:
    """DiffusionKit's tokenizer from the folder's vocabulary and merges."""
    from diffusionkit.mlx.tokenizer import Tokenizer

    vocabulary, path = read_json(folder / "vocab.json"), folder / "merges.txt"
    if lacking := [mark for mark in MARKS if mark not in vocabulary]:
        raise damaged(folder / "vocab.json", f"it has no {' and no '.join(lacking)}")
    try:
        lines = path.read_text(encoding="utf-8").strip().split("\n")
    except UnicodeDecodeError as error:
        raise damaged(path, f"it is not text in UTF-8 ({error})") from error
    # What follows the first line, of the 49152 tokens all but the bytes and both marks.
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    wanted = PUBLISHED_MERGES if len(vocabulary) == PUBLISHED_TOKENS else len(merges)
    if len(merges) != wanted or any(len(pair) != 2 for pair in merges):
        raise damaged(path, f"it has {len(merges)} merges of two tokens or fewer, not {wanted}")
    return Tokenizer({pair: rank for rank, pair in enumerate(merges)}, vocabulary, pad_with_eos)


def check_ids(path: Path, ids: Iterable[Any], encoder: Path, rows: int) -> None:
    """Raises unless the ids of a tokenizer's tokens are rows of the encoder's embedding: MLX reads
    beyond them whatever is in memory, or crashes."""
    if not all(type(number) is int and 0 <= number < rows for number in ids):
        raise damaged(
            path, f"its tokens' ids must be whole numbers below {rows}, as many as {encoder} knows"
        )


def t5_tokenizer(folder: Path, length: int) -> Any:
    """The tokenizer of transformers from the folder's files."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), legacy=False, model_max_length=length, local_files_only=True
        )
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise damaged(folder, f"its tokenizer cannot be read ({one_line(error)})") from error


def t5_tokens(tokenizer: Any, prompts: Sequence[str], length: int) -> np.ndarray:
    """(prompts, length) of T5's tokens, padded with 0."""
    rows = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        ids = tokenizer(prompt, max_length=length, truncation=True)["input_ids"]
        rows[row, : len(ids)] = ids
    return rows


def vae_decoder(location: Location, dtype: mx.Dtype, latent_channels: int) -> nn.Module:
    """DiffusionKit's VAE decoder, not read yet."""
    from diffusionkit.mlx.vae import VAEDecoder

    tensors, shape = decoder_tensors(location.tensors(), location.path)
    if shape.latent_channels != latent_channels:
        raise UserError(
            f"{location.path}: the VAE decodes {shape.latent_channels} channels, the model draws "
            f"{latent_channels}; put the model's own VAE there"
        )
    decoder = VAEDecoder(
        in_channels=shape.latent_channels,
        out_channels=3,
        block_out_channels=list(shape.channels),
        layers_per_block=shape.resnets,
    )
    fill(decoder, {k: w.astype(dtype) for k, w in tensors.items()}, location.path)
    return decoder


def diffusionkit_transformer(model: MMDiT) -> nn.Module:
    """DiffusionKit's own class with a model's weights; it has no k bias."""
    from diffusionkit.mlx import mmdit
    from diffusionkit.mlx.config import MMDiTConfig as TheirConfig

    config = model.config
    theirs = mmdit.MMDiT(
        TheirConfig(
            num_heads=config.heads,
            depth_multimodal=config.depth,
            hidden_size_override=config.hidden,
            max_latent_resolution=config.position_size,
            pooled_text_embed_dim=config.pooled_dim,
            token_level_text_embed_dim=config.text_dim,
            use_qk_norm=config.qk_norm,
            dtype=mx.float32,
            low_memory_mode=False,
        )
    )
    weights = tree_flatten(model.parameters())
    theirs.load_weights([(n, t) for n, t in weights if not n.endswith("k_proj.bias")])
    return theirs


def velocity_by_diffusionkit(
    model: MMDiT, latent: mx.array, text: mx.array, pooled: mx.array, timestep: float
) -> mx.array:
    """What DiffusionKit's own transformer gives with a model's weights."""
    theirs = diffusionkit_transformer(model)
    theirs.cache_modulation_params(pooled, mx.array([timestep]))
    return theirs(latent, text[:, :, None], mx.full((len(latent),), timestep))


def random_decoder(channels: Sequence[int], latent_channels: int = 16) -> nn.Module:
    """DiffusionKit's VAE decoder with random weights."""
    from diffusionkit.mlx.vae import VAEDecoder

    return VAEDecoder(latent_channels, 3, list(channels))
