"""What kernels have to know of a model: how many rows its layers meet, which of them share work."""

from __future__ import annotations

from collections.abc import Callable

import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..models.configs import MMDiTConfig
from ..models.mmdit import NORM_EPS, MMDiT, modulate
from ..models.paths import BLOCKS
from ..models.pipeline import Defaults
from ..quant.fused import Fused
from ..quant.joined import JoinedFeedForward, JoinedProjections, Norm
from ..sampling import uses_guidance

SIDE = 8  # pixels of a picture to one of the latent
TEXT_TOKENS = 154  # Stable Diffusion 3's
TEXT = "text_transformer_block"
ATTENTIONS = ("attn", "attn2")


def rows_of(config: MMDiTConfig, defaults: Defaults) -> Callable[[str], int]:
    """From a layer's path to the tokens that it meets at once, when one picture of the default size
    is drawn."""
    rows = 2 if uses_guidance(defaults.cfg_weight) else 1
    picture = defaults.height * defaults.width // (SIDE * config.patch) ** 2
    return lambda path: rows * (TEXT_TOKENS if TEXT in path else max(1, picture))


def join(model: MMDiT) -> list[str]:
    """Lets quantized layers share what they can; the paths of what was replaced."""
    found: dict[str, nn.Module] = {}
    for index, block in enumerate(model[BLOCKS]):
        for stream, module in block.children().items():
            joined = joined_parts(module, model.config.gelu == "tanh")
            found |= {f"{BLOCKS}.{index}.{stream}.{name}": part for name, part in joined.items()}
    model.update_modules(tree_unflatten(list(found.items())))
    return list(found)


def joined_parts(stream: nn.Module, gelu_is_tanh: bool) -> dict[str, nn.Module]:
    """By name, what is to take the place of a stream's attentions and MLP."""
    norm = Norm(modulate, NORM_EPS)
    found: dict[str, nn.Module] = {
        name: JoinedProjections(stream[name], norm)
        for name in ATTENTIONS
        if name in stream and shares(stream[name].q_proj)
    }
    if gelu_is_tanh and "mlp" in stream and fuses(stream.mlp.fc1) and fuses(stream.mlp.fc2):
        mlp = stream.mlp
        found["mlp"] = JoinedFeedForward(mlp.fc1, mlp.fc2, mlp._activation, norm)
    return found


def fuses(layer: nn.Module) -> bool:
    return isinstance(layer, Fused) and layer.fuses


def shares(layer: nn.Module) -> bool:
    return isinstance(layer, Fused) and layer.shares
