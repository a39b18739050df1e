"""LoRA files: folded into the weights for good, or added to each output at run time.

W gets scale·alpha/rank·(up·down). Two styles of keys are read: diffusers' (PEFT's), such as
`transformer.blocks.0.q.lora_A.weight`, and Kohya's, such as `lora_unet_blocks_0_q.lora_down.weight`
with an `.alpha` beside it. INT8 takes no adapter at run time, so there it is folded in first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..errors import UserError
from ..store import load_tensors
from .int8 import INT8Linear
from .linear import QuantizedLinear

DOWN = ("lora_A.weight", "lora_A.default.weight", "lora.down.weight", "lora_down.weight")
UP = ("lora_B.weight", "lora_B.default.weight", "lora.up.weight", "lora_up.weight")
OLD = re.compile(r"\.processor\.(to_\w+?)_lora\.(down|up)\.weight$")  # diffusers' before PEFT
DIFFUSERS_PREFIXES = ("transformer.", "unet.", "base_model.model.", "model.diffusion_model.")
KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_")
TEXT_ENCODERS = ("text_encoder", "lora_te")  # parts that are not the transformer's
QUANTIZED = (INT8Linear, QuantizedLinear, nn.QuantizedLinear)

# A linear's published name to the model's paths; of several each has a part of the rows, in order.
Aliases = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Adapter:
    """What one linear gets: scale·(up·down), `down` (rank, columns) and `up` (rows, rank)."""

    down: mx.array
    up: mx.array
    scale: float = 1.0

    def delta(self) -> mx.array:
        """(rows, columns) float32, to be added to the weight."""
        return self.scale * (self.up.astype(mx.float32) @ self.down.astype(mx.float32))

    def parts(self, count: int) -> list[Adapter]:
        """One for each of so many equal parts of the rows."""
        rows = len(self.up) // count
        return [replace(self, up=self.up[i * rows : (i + 1) * rows]) for i in range(count)]


class LoRALinear(nn.Module):
    """A linear and its adapter, added at every call."""

    def __init__(self, linear: nn.Linear, adapter: Adapter) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a, self.lora_b = adapter.down.T, adapter.up.T
        self._scale = adapter.scale

    def __call__(self, x: mx.array) -> mx.array:
        thin = x @ self.lora_a.astype(x.dtype) @ self.lora_b.astype(x.dtype)
        return self.linear(x) + self._scale * thin


def merge_lora(
    model: nn.Module, file: str | Path, scale: float = 1.0, *, aliases: Aliases | None = None
) -> list[str]:
    """Adds the file's adapters to the model's weights, in float32 and once; returns the paths.

    `aliases` are names that linears have in files and not in the model, as `published_linears`
    of src/models/published.py gives them. All is checked before the first weight changes.
    """
    found = matched(model, file, scale, aliases)
    modules = dict(model.named_modules())
    for path, adapter in found.items():
        linear = modules[path]
        merged = linear.weight.astype(mx.float32) + adapter.delta()
        linear.weight = merged.astype(linear.weight.dtype)
        mx.eval(linear.weight)
    return list(found)


def attach_lora(
    model: nn.Module, file: str | Path, scale: float = 1.0, *, aliases: Aliases | None = None
) -> list[str]:
    """Adds the file's adapters at run time, so that they can be taken away; returns the paths."""
    found = matched(model, file, scale, aliases, "take an adapter at run time")
    modules = dict(model.named_modules())
    layers = [(path, LoRALinear(modules[path], adapter)) for path, adapter in found.items()]
    model.update_modules(tree_unflatten(layers))
    return list(found)


def matched(
    model: nn.Module,
    file: str | Path,
    scale: float,
    aliases: Aliases | None,
    wish: str = "be merged with a LoRA",
) -> dict[str, Adapter]:
    """The file's adapters by the path of their linear; what does not fit the model is an error."""
    modules = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, LoRALinear, *QUANTIZED))
    }
    known = {**{path: (path,) for path in modules}, **(aliases or {})}
    found: dict[str, Adapter] = {}
    for name, adapter in read_lora(file, scale).items():
        paths = paths_of(name, known)
        if not paths:
            raise UserError(
                f"{file}: the model has no linear {name!r}; give the LoRA of this model"
            )
        for path, part in zip(paths, adapter.parts(len(paths)), strict=True):
            if path in found:
                raise UserError(f"{file}: two adapters are for {path}; give a LoRA with one each")
            check_fit(file, path, modules[path], part, wish)
            found[path] = part
    return found


def check_fit(file: str | Path, path: str, module: nn.Module, adapter: Adapter, wish: str) -> None:
    if isinstance(module, QUANTIZED):
        raise UserError(
            f"{path} is quantized and cannot {wish}: its weight is codes, to which nothing can be "
            f"added without rounding them again; load the 16-bit model, call merge_lora(model, "
            f"{str(file)!r}, scale), then quantize"
        )
    if isinstance(module, LoRALinear):
        raise UserError(f"{path} has an adapter at run time already; load the model again")
    rows, columns = module.weight.shape
    if adapter.up.shape[0] != rows or adapter.down.shape[1] != columns:
        raise UserError(
            f"{file}: the adapter of {path} is for ({adapter.up.shape[0]}, "
            f"{adapter.down.shape[1]}) weights, the model's are {(rows, columns)}; give the LoRA "
            "of this model"
        )


def read_lora(file: str | Path, scale: float = 1.0) -> dict[str, Adapter]:
    """Adapters by the linear's name in the file, the style's own prefix still on it."""
    if not math.isfinite(scale):
        raise UserError(
            f"scale {scale} of a LoRA is not finite; valid: any finite number, 1 to take it as it "
            "was trained"
        )
    tensors = load_tensors(file)
    parts: dict[str, dict[str, mx.array]] = {}
    for key, tensor in tensors.items():
        if key.startswith(TEXT_ENCODERS):
            raise UserError(
                f"{file} has an adapter for a text encoder ({key}), which is not read; give one "
                "for the transformer alone"
            )
        name, part = split_key(key)
        if part is None:
            raise UserError(
                f"{file}: {key} is no part of a LoRA that this program reads; valid endings: "
                f"{', '.join((*DOWN, *UP, 'alpha'))}"
            )
        if part in parts.setdefault(name, {}):
            raise UserError(f"{file} has {part} of {name} twice; give a sound LoRA")
        parts[name][part] = tensor
    if not parts:
        raise UserError(f"{file} holds no adapter; give a LoRA")
    return {name: adapter_of(file, name, own, scale) for name, own in parts.items()}


def split_key(key: str) -> tuple[str, str | None]:
    """The linear's name, and whether this is its down, up or alpha; none where it is neither."""
    if old := OLD.search(key):
        name = "to_out.0" if old[1] == "to_out" else old[1]
        return f"{key[: old.start()]}.{name}", old[2]
    for part, endings in (("down", DOWN), ("up", UP), ("alpha", ("alpha",))):
        for ending in endings:
            if key.endswith(f".{ending}"):
                return key.removesuffix(f".{ending}"), part
    return key, None


def adapter_of(file: str | Path, name: str, parts: Mapping[str, mx.array], scale: float) -> Adapter:
    """Checked, with alpha/rank in its scale; without an alpha that is 1."""
    if missing := {"down", "up"} - parts.keys():
        raise UserError(f"{file}: {name} has no {min(missing)} weight; give a whole LoRA")
    down, up = parts["down"], parts["up"]
    if down.ndim == 4 and up.ndim == 4 and down.shape[2:] == up.shape[2:] == (1, 1):
        down, up = down[..., 0, 0], up[..., 0, 0]
    if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1] or not len(down):
        raise UserError(
            f"{file}: {name} has down {tuple(down.shape)} and up {tuple(up.shape)}; valid: "
            "(rank, inputs) and (outputs, rank)"
        )
    if not all(bool(mx.isfinite(matrix).all()) for matrix in (down, up)):
        raise UserError(f"{file}: {name} holds NaN or infinity; give a sound LoRA")
    alpha = parts.get("alpha")
    if alpha is None:
        return Adapter(down, up, scale)
    if alpha.size != 1 or not bool(mx.isfinite(alpha).all()):
        raise UserError(f"{file}: alpha of {name} is not one finite number; give a sound LoRA")
    return Adapter(down, up, scale * alpha.item() / len(down))


def paths_of(name: str, known: Aliases) -> tuple[str, ...]:
    """The model's paths of what a file names in either style; none if it has no such linear."""
    for prefix in KOHYA_PREFIXES:
        if name.startswith(prefix):
            flat = name.removeprefix(prefix)
            same = {paths for dotted, paths in known.items() if dotted.replace(".", "_") == flat}
            return same.pop() if len(same) == 1 else ()
    bare = [name, *(name.removeprefix(p) for p in DIFFUSERS_PREFIXES if name.startswith(p))]
    return next((known[candidate] for candidate in bare if candidate in known), ())
