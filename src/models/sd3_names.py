"""The published names of the text encoders' and the VAE's tensors, as DiffusionKit's classes have
them, and the shapes of these parts, read off their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import UserError
from ..store.files import replacing

Tensors = dict[str, mx.array]
Rules = tuple[tuple[str, str], ...]

CLIP_HEAD, GROUPS = 64, 32  # of every published CLIP and VAE; no tensor tells them

CLIP: Rules = (
    (r"^text_model\.", ""),
    (r"^(embeddings|encoder)\.", ""),
    (r"\.self_attn\.([qkv])_proj\.", r".attention.\1_proj."),
    (r"\.self_attn\.out_proj\.", ".attention.out_proj."),
    (r"\.q_proj\.", ".query_proj."),
    (r"\.k_proj\.", ".key_proj."),
    (r"\.v_proj\.", ".value_proj."),
    (r"\.mlp\.fc([12])\.", r".linear\1."),
)

T5: Rules = (
    (r"^encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.",
     "encoder.relative_attention_bias.embeddings."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm\.", r"encoder.layers.\1.ln1."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm\.", r"encoder.layers.\1.ln2."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.", r"encoder.layers.\1.attention."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.", r"encoder.layers.\1.dense."),
    (r"\.attention\.q\.", ".attention.query_proj."),
    (r"\.attention\.k\.", ".attention.key_proj."),
    (r"\.attention\.v\.", ".attention.value_proj."),
    (r"\.attention\.o\.", ".attention.out_proj."),
    (r"^encoder\.final_layer_norm\.", "encoder.ln."),
    (r"^(shared|encoder\.embed_tokens)\.", "wte."),
)  # fmt: skip

VAE_STABILITY: Rules = (
    (r"^up\.", "up_blocks."),
    (r"\.block\.(\d)", r".resnets.\1"),
    (r"\.upsample\.conv\.", ".upsample."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^mid\.block_1\.", "mid_blocks.0."),
    (r"^mid\.attn_1\.", "mid_blocks.1."),
    (r"^mid\.block_2\.", "mid_blocks.2."),
    (r"^mid_blocks\.1\.norm\.", "mid_blocks.1.group_norm."),
    (r"\.q\.", ".query_proj."),
    (r"\.k\.", ".key_proj."),
    (r"\.v\.", ".value_proj."),
    (r"\.proj_out\.", ".out_proj."),
    (r"^norm_out\.", "conv_norm_out."),
)

VAE_DIFFUSERS: Rules = (
    (r"\.upsamplers\.0\.conv\.", ".upsample."),
    (r"^mid_block\.resnets\.0\.", "mid_blocks.0."),
    (r"^mid_block\.resnets\.1\.", "mid_blocks.2."),
    (r"^mid_block\.attentions\.0\.", "mid_blocks.1."),
    (r"\.to_q\.", ".query_proj."),
    (r"\.to_k\.", ".key_proj."),
    (r"\.to_v\.", ".value_proj."),
    (r"\.to_out\.0\.", ".out_proj."),
)


@dataclass(frozen=True)
class ClipShape:
    layers: int
    width: int
    heads: int
    positions: int
    vocabulary: int
    projection: int | None  # none: the pooled text is not projected


@dataclass(frozen=True)
class T5Shape:
    layers: int
    width: int
    heads: int
    head_width: int
    hidden: int
    vocabulary: int
    buckets: int


@dataclass(frozen=True)
class DecoderShape:
    channels: tuple[int, ...]  # from the picture's resolution to the latent's
    resnets: int  # of each resolution
    latent_channels: int


def renamed(tensors: Mapping[str, mx.array], rules: Rules) -> Tensors:
    def rename(name: str) -> str:
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    return {rename(name): tensor for name, tensor in tensors.items()}


def clip_tensors(tensors: Tensors, path: Path) -> tuple[Tensors, ClipShape]:
    """Under DiffusionKit's names, with their shape."""
    # Buffers and a temperature that some files carry; no layer reads them.
    extra = ("position_ids", "logit_scale")
    found = renamed({k: v for k, v in tensors.items() if not k.endswith(extra)}, CLIP)
    vocabulary, width = shape(found, "token_embedding.weight", path)
    projection = found.get("text_projection.weight")
    return found, ClipShape(
        layers=count(found, r"layers\.(\d+)\."),
        width=width,
        heads=max(1, width // CLIP_HEAD),
        positions=shape(found, "position_embedding.weight", path)[0],
        vocabulary=vocabulary,
        projection=None if projection is None else projection.shape[0],
    )


def t5_tensors(tensors: Tensors, path: Path) -> tuple[Tensors, T5Shape]:
    """Under DiffusionKit's names, with their shape."""
    tensors = {k: v for k, v in tensors.items() if not k.endswith("logit_scale")}
    found = renamed(tensors, T5)
    vocabulary, width = shape(found, "wte.weight", path)
    buckets, heads = shape(found, "encoder.relative_attention_bias.embeddings.weight", path)
    inner = shape(found, "encoder.layers.0.attention.query_proj.weight", path)[0]
    return found, T5Shape(
        layers=count(found, r"encoder\.layers\.(\d+)\."),
        width=width,
        heads=heads,
        head_width=inner // max(1, heads),
        hidden=shape(found, "encoder.layers.0.dense.wi_0.weight", path)[0],
        vocabulary=vocabulary,
        buckets=buckets,
    )


def decoder_tensors(tensors: Tensors, path: Path) -> tuple[Tensors, DecoderShape]:
    """The VAE's decoder under DiffusionKit's names, channels last, with its shape."""
    shape(tensors, "decoder.conv_in.weight", path)
    found = {
        name.removeprefix("decoder."): tensor
        for name, tensor in tensors.items()
        if name.startswith("decoder.")
    }
    if any(name.startswith("up_blocks.") for name in found):
        found = reversed_blocks(renamed(found, VAE_DIFFUSERS))
    else:
        found = renamed(found, VAE_STABILITY)
    found = {name: channels_last(name, tensor) for name, tensor in found.items()}
    blocks = count(found, r"up_blocks\.(\d+)\.")
    channels = [
        shape(found, f"up_blocks.{i}.resnets.0.conv2.weight", path)[0]
        for i in range(max(blocks, 1))
    ]
    return found, DecoderShape(
        channels=tuple(channels),
        resnets=count(found, r"up_blocks\.0\.resnets\.(\d+)\."),
        latent_channels=shape(found, "conv_in.weight", path)[-1],
    )


def reversed_blocks(tensors: Tensors) -> Tensors:
    """diffusers counts the blocks from the latent, Stability and DiffusionKit from the picture."""
    last = count(tensors, r"up_blocks\.(\d+)\.") - 1
    place: Callable[[re.Match], str] = lambda match: f"up_blocks.{last - int(match[1])}."  # noqa: E731
    return {re.sub(r"^up_blocks\.(\d+)\.", place, k): v for k, v in tensors.items()}


def channels_last(name: str, tensor: mx.array) -> mx.array:
    """Convolutions as MLX has them; those of one pixel that are linears there, as matrices."""
    if tensor.ndim == 4 and re.search(r"(_proj|conv_shortcut)\.weight$", name):
        return tensor[:, :, 0, 0]
    return tensor.transpose(0, 2, 3, 1) if tensor.ndim == 4 else tensor


def count(names: Mapping[str, mx.array], pattern: str) -> int:
    found = (re.match(pattern, name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def shape(tensors: Tensors, name: str, path: Path) -> tuple[int, ...]:
    if name not in tensors:
        held = ", ".join(sorted(tensors)[:2]) or "nothing"
        raise UserError(f"{path}: tensor {name} is missing (it holds {held}…); {replacing(path)}")
    return tuple(tensors[name].shape)
