"""The published packages' own transformers with our weights: the references of the parity tests."""

from __future__ import annotations

from dataclasses import replace

from src.models.configs import MMDiTConfig
from src.models.mmdit import MMDiT

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .checkpoint_layouts import to_diffusers

# Shrunken SD3-medium, SD3.5-large and SD3.5-medium: hidden = 64 x depth, as published.
SD3 = MMDiTConfig(depth=2, hidden=128, heads=2, text_dim=96, pooled_dim=48, position_size=32)
SD35_LARGE = replace(SD3, depth=3, hidden=192, heads=3, qk_norm=True)
SD35_MEDIUM = replace(SD35_LARGE, dual_attention_blocks=2)


def without_k_bias(model: MMDiT) -> MMDiT:
    """The same model with its k biases set to zero."""
    weights = tree_flatten(model.parameters())
    zero = [(k, mx.zeros_like(v)) for k, v in weights if k.endswith("k_proj.bias")]
    model.update(tree_unflatten(zero))
    return model


def diffusers_model(ours: MMDiT):
    """diffusers' own class with the same weights."""
    import torch
    from diffusers import SD3Transformer2DModel

    config = ours.config
    theirs = SD3Transformer2DModel(
        sample_size=32,
        patch_size=config.patch,
        in_channels=config.latent_channels,
        num_layers=config.depth,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=config.text_dim,
        caption_projection_dim=config.hidden,
        pooled_projection_dim=config.pooled_dim,
        out_channels=config.latent_channels,
        pos_embed_max_size=config.position_size,
        dual_attention_layers=tuple(range(config.dual_attention_blocks)),
        qk_norm="rms_norm" if config.qk_norm else None,
    )
    weights = {k: torch.from_numpy(np.array(v)) for k, v in to_diffusers(ours).items()}
    theirs.load_state_dict(weights, strict=True)
    return theirs


def run_diffusers(theirs, *inputs: mx.array) -> np.ndarray:
    """The velocity for (latent, text, pooled, timestep), channels last."""
    import torch

    latent, text, pooled, timestep = (torch.from_numpy(np.array(x)) for x in inputs)
    with torch.no_grad():
        out = theirs(latent.permute(0, 3, 1, 2), text, pooled, timestep).sample
    return out.permute(0, 2, 3, 1).numpy()
