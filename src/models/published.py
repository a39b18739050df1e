"""The published names of a transformer's linears, as LoRA files have them."""

from __future__ import annotations

import re

import mlx.nn as nn

from .checkpoints import IMAGE, TEXT
from .mmdit import MMDiT
from .paths import BLOCKS

Aliases = dict[str, tuple[str, ...]]  # name to paths; several are rows of one matrix, in order

# Linears of a block that are Stability's under other names, and diffusers' names of all.
STABILITY = {
    "attn.o_proj": "attn.proj",
    "attn2.o_proj": "attn2.proj",
    "adaLN_modulation.layers.1": "adaLN_modulation.1",
}
DIFFUSERS = {
    IMAGE: {
        **{f"attn.{x}_proj": f"attn.to_{x}" for x in "qkv"},
        **{f"attn2.{x}_proj": f"attn2.to_{x}" for x in "qkv"},
        "attn.o_proj": "attn.to_out.0",
        "attn2.o_proj": "attn2.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
        "adaLN_modulation.layers.1": "norm1.linear",
    },
    TEXT: {
        **{f"attn.{x}_proj": f"attn.add_{x}_proj" for x in "qkv"},
        "attn.o_proj": "attn.to_add_out",
        "mlp.fc1": "ff_context.net.0.proj",
        "mlp.fc2": "ff_context.net.2",
        "adaLN_modulation.layers.1": "norm1_context.linear",
    },
}
STABILITY_STREAMS = {IMAGE: "x_block", TEXT: "context_block"}
FUSED = re.compile(r"(attn2?)\.[qkv]_proj$")


def published_linears(transformer: MMDiT) -> Aliases:
    """Stability's and diffusers' names of the blocks' linears; q, k and v are fused in the former.

    diffusers' modulation of the last text block has its halves the other way round, so it is left
    out: what is for it must not be applied as it is.
    """
    found: Aliases = {}
    last = f"{BLOCKS}.{transformer.config.depth - 1}.{TEXT}.adaLN_modulation.layers.1"
    for path, module in transformer.named_modules():
        match = re.fullmatch(rf"{BLOCKS}\.(\d+)\.({IMAGE}|{TEXT})\.(.+)", path)
        if not isinstance(module, nn.Linear) or match is None:
            continue
        index, stream, name = match.groups()
        block = f"joint_blocks.{index}.{STABILITY_STREAMS[stream]}"
        if fused := FUSED.fullmatch(name):
            parts = tuple(f"{BLOCKS}.{index}.{stream}.{fused[1]}.{x}_proj" for x in "qkv")
            found[f"{block}.{fused[1]}.qkv"] = parts
        else:
            found[f"{block}.{STABILITY.get(name, name)}"] = (path,)
        if path != last:
            found[f"transformer_blocks.{index}.{DIFFUSERS[stream][name]}"] = (path,)
    return found
