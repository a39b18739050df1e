"""Names and shapes of published transformers, written out from their files' side, for tests.

Each family is a table: name of a weight to shape and to what must become of it, None for a layer
that is converted, else a word of the reason for keeping it. Widths are the least that convert.
"""

from __future__ import annotations

import os
from pathlib import Path

from src.store import TensorInfo, stream_tensors
from src.store.tensors import lay_out

import numpy as np

WIDE, HIDDEN = 2048, 1024
SQUARE, UP, DOWN = (HIDDEN, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE)
Family = dict[str, tuple[tuple[int, ...], "str | None"]]


def diffusers_sd3() -> Family:
    family: Family = {
        "pos_embed.proj": ((HIDDEN, 16, 2, 2), "embedding"),
        "time_text_embed.timestep_embedder.linear_1": ((HIDDEN, 256), "embedding"),
        "time_text_embed.timestep_embedder.linear_2": (SQUARE, "embedding"),
        "time_text_embed.text_embedder.linear_1": (DOWN, "embedding"),
        "context_embedder": ((HIDDEN, 4096), "embedding"),
        "norm_out.linear": (UP, "norm"),
        "proj_out": ((64, HIDDEN), "output projection"),
    }
    for i in range(2):
        block = f"transformer_blocks.{i}"
        for path in ("attn", "attn2"):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                family[f"{block}.{path}.{name}"] = (SQUARE, None)
        for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            family[f"{block}.attn.{name}"] = (SQUARE, None)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            family[f"{block}.attn.{name}"] = ((64,), "norm")
        for name in ("ff", "ff_context"):
            family[f"{block}.{name}.net.0.proj"] = (UP, None)
            family[f"{block}.{name}.net.2"] = (DOWN, None)
        for name in ("norm1", "norm1_context"):
            family[f"{block}.{name}.linear"] = ((6 * HIDDEN, HIDDEN), "norm")
    return family


def diffusers_flux() -> Family:
    family: Family = {
        "x_embedder": ((HIDDEN, 64), "embedding"),
        "context_embedder": ((HIDDEN, 4096), "embedding"),
        "time_text_embed.guidance_embedder.linear_2": (SQUARE, "embedding"),
        "norm_out.linear": (UP, "norm"),
        "proj_out": ((64, HIDDEN), "output projection"),
        "transformer_blocks.0.norm1.linear": ((6 * HIDDEN, HIDDEN), "norm"),
        "transformer_blocks.0.ff.net.0.proj": (UP, None),
        "transformer_blocks.0.ff.net.2": (DOWN, None),
        "transformer_blocks.0.ff_context.net.2": (DOWN, None),
        "single_transformer_blocks.0.norm.linear": ((3 * HIDDEN, HIDDEN), "norm"),
        "single_transformer_blocks.0.proj_mlp": (UP, None),
        "single_transformer_blocks.0.proj_out": ((HIDDEN, HIDDEN + WIDE), None),
    }
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"):
        family[f"transformer_blocks.0.attn.{name}"] = (SQUARE, None)
    for name in ("to_q", "to_k", "to_v"):
        family[f"single_transformer_blocks.0.attn.{name}"] = (SQUARE, None)
    return family


def original_flux() -> Family:
    family: Family = {
        "img_in": ((HIDDEN, 64), "input projection"),
        "txt_in": ((HIDDEN, 4096), "input projection"),
        "time_in.in_layer": ((HIDDEN, 256), "embedding"),
        "time_in.out_layer": (SQUARE, "embedding"),
        "vector_in.out_layer": (SQUARE, "input projection"),
        "guidance_in.out_layer": (SQUARE, "input projection"),
        "final_layer.linear": ((64, HIDDEN), "output projection"),
        "final_layer.adaLN_modulation.1": (UP, "modulation"),
        "single_blocks.0.modulation.lin": ((3 * HIDDEN, HIDDEN), "modulation"),
        "single_blocks.0.linear1": ((3 * HIDDEN + WIDE, HIDDEN), None),
        "single_blocks.0.linear2": ((HIDDEN, HIDDEN + WIDE), None),
    }
    for stream in ("img", "txt"):
        family[f"double_blocks.0.{stream}_attn.qkv"] = ((3 * HIDDEN, HIDDEN), None)
        family[f"double_blocks.0.{stream}_attn.proj"] = (SQUARE, None)
        family[f"double_blocks.0.{stream}_mlp.0"] = (UP, None)
        family[f"double_blocks.0.{stream}_mlp.2"] = (DOWN, None)
        family[f"double_blocks.0.{stream}_mod.lin"] = ((6 * HIDDEN, HIDDEN), "modulation")
    return family


def stability_sd3() -> Family:
    model, encoder = "model.diffusion_model", "text_encoders.t5xxl.transformer.encoder.block.0"
    family: Family = {
        f"{model}.x_embedder.proj": ((HIDDEN, 16, 2, 2), "embedding"),
        f"{model}.t_embedder.mlp.0": ((HIDDEN, 256), "embedding"),
        f"{model}.t_embedder.mlp.2": (SQUARE, "embedding"),
        f"{model}.y_embedder.mlp.0": (DOWN, "embedding"),
        f"{model}.context_embedder": ((HIDDEN, 4096), "embedding"),
        f"{model}.final_layer.linear": ((64, HIDDEN), "output projection"),
        f"{model}.final_layer.adaLN_modulation.1": (UP, "modulation"),
        f"{encoder}.layer.0.SelfAttention.q": (SQUARE, "another part"),
        "first_stage_model.encoder.mid.attn_1.q": ((512, 512, 1, 1), "another part"),
    }
    for block in ("x_block", "context_block"):
        path = f"{model}.joint_blocks.0.{block}"
        family[f"{path}.attn.qkv"] = ((3 * HIDDEN, HIDDEN), None)
        family[f"{path}.attn.proj"] = (SQUARE, None)
        family[f"{path}.attn.ln_q"] = ((64,), "norm")
        family[f"{path}.mlp.fc1"] = (UP, None)
        family[f"{path}.mlp.fc2"] = (DOWN, None)
        family[f"{path}.adaLN_modulation.1"] = ((6 * HIDDEN, HIDDEN), "modulation")
    return family


def wan() -> Family:
    family: Family = {
        "patch_embedding": ((HIDDEN, 16, 1, 2, 2), "embedding"),
        "text_embedding.0": ((HIDDEN, 4096), "embedding"),
        "time_embedding.2": (SQUARE, "embedding"),
        "time_projection.1": ((6 * HIDDEN, HIDDEN), "embedding"),
        "img_emb.proj.1": (SQUARE, "embedding"),
        "head.head": ((64, HIDDEN), "output projection"),
        "blocks.0.norm3": ((HIDDEN,), "norm"),
        "blocks.0.self_attn.norm_q": ((HIDDEN,), "norm"),
        "blocks.0.ffn.0": (UP, None),
        "blocks.0.ffn.2": (DOWN, None),
    }
    for attention, names in (("self_attn", "qkvo"), ("cross_attn", [*"qkvo", "k_img", "v_img"])):
        for name in names:
            family[f"blocks.0.{attention}.{name}"] = (SQUARE, None)
    return family


def kandinsky() -> Family:
    block = "visual_transformer_blocks.0"
    family: Family = {
        "time_embeddings.in_layer": (SQUARE, "embedding"),
        "text_embeddings.in_layer": ((HIDDEN, 3584), "embedding"),
        "pooled_text_embeddings.in_layer": (SQUARE, "embedding"),
        "visual_embeddings.in_layer": ((HIDDEN, 132), "embedding"),
        "out_layer.modulation.out_layer": (UP, "modulation"),
        "out_layer.out_layer": ((64, HIDDEN), "output projection"),
        f"{block}.visual_modulation.out_layer": ((9 * HIDDEN, HIDDEN), "modulation"),
        f"{block}.self_attention.query_norm": ((64,), "norm"),
        f"{block}.feed_forward.in_layer": (UP, None),
        f"{block}.feed_forward.out_layer": (DOWN, None),
        "text_transformer_blocks.0.text_modulation.out_layer": (UP, "modulation"),
        "text_transformer_blocks.0.self_attention.to_query": (SQUARE, None),
        "text_transformer_blocks.0.feed_forward.in_layer": (UP, None),
    }
    for attention in ("self_attention", "cross_attention"):
        for name in ("to_query", "to_key", "to_value", "out_layer"):
            family[f"{block}.{attention}.{name}"] = (SQUARE, None)
    return family


FAMILIES = {
    make.__name__: make
    for make in (diffusers_sd3, diffusers_flux, original_flux, stability_sd3, wan, kandinsky)
}


def infos(family: Family) -> dict[str, TensorInfo]:
    """The family's tensors in bfloat16, with a bias for every weight of two dimensions."""
    tensors = {}
    for path, (shape, _) in family.items():
        tensors[f"{path}.weight"] = TensorInfo("bfloat16", shape, 2 * int(np.prod(shape)))
        if len(shape) == 2:
            tensors[f"{path}.bias"] = TensorInfo("bfloat16", shape[:1], 2 * shape[0])
    return tensors


def write_names(path: Path, family: Family) -> None:
    """A file of that family whose weights are zeros, which take no room on the disk."""
    head, _ = lay_out(path, infos(family), {"format": "pt"})
    path.write_bytes(head)
    os.truncate(path, len(head) + sum(info.nbytes for info in infos(family).values()))


def write_family(path: Path, family: Family) -> None:
    """A file of that family with Gaussian weights, of which some repeat."""
    values = np.random.default_rng(0).standard_normal(2**20 + 7, np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    with stream_tensors(path, infos(family), {"format": "pt"}) as writer:
        for name, info in infos(family).items():
            writer.write(name, np.resize(bits, info.nbytes // 2))
            bits = np.roll(bits, 12345)
