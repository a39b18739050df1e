"""Writes a transformer's weights under the names of the published layouts, for tests.

Each mapping is written out from the layout's side, independently of the reader's rules.
"""

from __future__ import annotations

from src.models.mmdit import MMDiT

import mlx.core as mx
from mlx.utils import tree_flatten

STREAMS = {"image": "x_block", "text": "context_block"}


def to_mlx(model: MMDiT) -> dict[str, mx.array]:
    """DiffusionKit's names."""
    return dict(tree_flatten(model.parameters()))


def to_stability(model: MMDiT, prefix: str = "model.diffusion_model.") -> dict[str, mx.array]:
    """One file, q, k and v fused, convolutions channels first."""
    w = to_mlx(model)
    out = {
        "pos_embed": w["x_pos_embedder.pos_embed.weight"][None],
        "x_embedder.proj.weight": w["x_embedder.proj.weight"].transpose(0, 3, 1, 2),
        "x_embedder.proj.bias": w["x_embedder.proj.bias"],
    }
    for kind in ("weight", "bias"):
        out[f"context_embedder.{kind}"] = w[f"context_embedder.{kind}"]
        out[f"final_layer.linear.{kind}"] = w[f"final_layer.linear.{kind}"]
        out[f"final_layer.adaLN_modulation.1.{kind}"] = w[
            f"final_layer.adaLN_modulation.layers.1.{kind}"
        ]
        for embedder in ("t_embedder", "y_embedder"):
            for i in (0, 2):
                out[f"{embedder}.mlp.{i}.{kind}"] = w[f"{embedder}.mlp.layers.{i}.{kind}"]
        for i in range(model.config.depth):
            for stream, block in STREAMS.items():
                source = f"multimodal_transformer_blocks.{i}.{stream}_transformer_block"
                target = f"joint_blocks.{i}.{block}"
                out[f"{target}.adaLN_modulation.1.{kind}"] = w[
                    f"{source}.adaLN_modulation.layers.1.{kind}"
                ]
                for attn in ("attn", "attn2"):
                    if f"{source}.{attn}.q_proj.weight" not in w:
                        continue
                    out[f"{target}.{attn}.qkv.{kind}"] = mx.concatenate(
                        [w[f"{source}.{attn}.{x}_proj.{kind}"] for x in "qkv"]
                    )
                    if f"{source}.{attn}.o_proj.{kind}" in w:
                        out[f"{target}.{attn}.proj.{kind}"] = w[f"{source}.{attn}.o_proj.{kind}"]
                    norm = "qk_norm" + attn[4:]
                    for x in "qk":
                        if f"{source}.{norm}.{x}_norm.weight" in w:
                            out[f"{target}.{attn}.ln_{x}.weight"] = w[
                                f"{source}.{norm}.{x}_norm.weight"
                            ]
                for fc in ("fc1", "fc2"):
                    if f"{source}.mlp.{fc}.{kind}" in w:
                        out[f"{target}.mlp.{fc}.{kind}"] = w[f"{source}.mlp.{fc}.{kind}"]
    return {prefix + name: mx.contiguous(tensor) for name, tensor in out.items()}


def to_diffusers(model: MMDiT) -> dict[str, mx.array]:
    """diffusers' names; scale before shift in the two modulations that have only these."""
    w = to_mlx(model)
    last = model.config.depth - 1

    def swapped(tensor: mx.array) -> mx.array:
        shift, scale = mx.split(tensor, 2)
        return mx.concatenate([scale, shift])

    out = {
        "pos_embed.pos_embed": w["x_pos_embedder.pos_embed.weight"][None],
        "pos_embed.proj.weight": w["x_embedder.proj.weight"].transpose(0, 3, 1, 2),
        "pos_embed.proj.bias": w["x_embedder.proj.bias"],
    }
    for kind in ("weight", "bias"):
        out[f"context_embedder.{kind}"] = w[f"context_embedder.{kind}"]
        out[f"proj_out.{kind}"] = w[f"final_layer.linear.{kind}"]
        out[f"norm_out.linear.{kind}"] = swapped(w[f"final_layer.adaLN_modulation.layers.1.{kind}"])
        for ours, theirs in (("t", "timestep"), ("y", "text")):
            for i, j in ((0, 1), (2, 2)):
                out[f"time_text_embed.{theirs}_embedder.linear_{j}.{kind}"] = w[
                    f"{ours}_embedder.mlp.layers.{i}.{kind}"
                ]
        for i in range(model.config.depth):
            image = f"multimodal_transformer_blocks.{i}.image_transformer_block"
            text = f"multimodal_transformer_blocks.{i}.text_transformer_block"
            pairs = {
                f"norm1.linear.{kind}": f"{image}.adaLN_modulation.layers.1.{kind}",
                f"attn.to_out.0.{kind}": f"{image}.attn.o_proj.{kind}",
                f"attn.to_add_out.{kind}": f"{text}.attn.o_proj.{kind}",
                f"attn2.to_out.0.{kind}": f"{image}.attn2.o_proj.{kind}",
                f"ff.net.0.proj.{kind}": f"{image}.mlp.fc1.{kind}",
                f"ff.net.2.{kind}": f"{image}.mlp.fc2.{kind}",
                f"ff_context.net.0.proj.{kind}": f"{text}.mlp.fc1.{kind}",
                f"ff_context.net.2.{kind}": f"{text}.mlp.fc2.{kind}",
            }
            for x in "qkv":
                pairs[f"attn.to_{x}.{kind}"] = f"{image}.attn.{x}_proj.{kind}"
                pairs[f"attn.add_{x}_proj.{kind}"] = f"{text}.attn.{x}_proj.{kind}"
                pairs[f"attn2.to_{x}.{kind}"] = f"{image}.attn2.{x}_proj.{kind}"
            for x in "qk":
                pairs[f"attn.norm_{x}.weight"] = f"{image}.qk_norm.{x}_norm.weight"
                pairs[f"attn.norm_added_{x}.weight"] = f"{text}.qk_norm.{x}_norm.weight"
                pairs[f"attn2.norm_{x}.weight"] = f"{image}.qk_norm2.{x}_norm.weight"
            for theirs, ours in pairs.items():
                if ours in w:
                    out[f"transformer_blocks.{i}.{theirs}"] = w[ours]
            context = w[f"{text}.adaLN_modulation.layers.1.{kind}"]
            out[f"transformer_blocks.{i}.norm1_context.linear.{kind}"] = (
                swapped(context) if i == last else context
            )
    return {name: mx.contiguous(tensor) for name, tensor in out.items()}
