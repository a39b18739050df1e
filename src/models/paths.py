"""Modules found and replaced by their dotted path, such as `…blocks.3.image_….mlp.fc2`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import mlx.nn as nn

from ..errors import UserError

BLOCKS = "multimodal_transformer_blocks"
MODULATION = "adaLN_modulation"  # kept at 16 bits
EMBEDDERS = ("y_embedder", "t_embedder")  # of the pooled text and the timestep


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that quantization is about, by path, block after block.

    All of the blocks' but the modulation: 285 in SD3-medium, whose last text block ends at its
    attention.
    """
    linears = {}
    for index, block in enumerate(model[BLOCKS]):
        # Sorted, since MLX lists a module's children last to first.
        for path, module in sorted(block.named_modules(), key=lambda item: item[0]):
            if isinstance(module, nn.Linear) and MODULATION not in path:
                linears[f"{BLOCKS}.{index}.{path}"] = module
    return linears


def modulates(name: str) -> bool:
    """Whether nothing but the modulation reads that parameter."""
    return MODULATION in name or name.startswith(EMBEDDERS)


def input_of(path: str) -> str:
    """The path that stands for a linear's input: q, k and v of one attention share theirs."""
    parent, _, name = path.rpartition(".")
    return f"{parent}.q_proj" if name in ("k_proj", "v_proj") else path


def values_of(path: str) -> str:
    """The path that stands for an o_proj's values: the joint attention mixes those of both streams,
    so what is done to them is done to both inputs. Other paths stand for themselves."""
    if path.endswith("text_transformer_block.attn.o_proj"):
        return path.replace("text_transformer_block", "image_transformer_block")
    return path


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module with that path; a path that leads nowhere is an error."""
    module = model
    for part in path.split("."):
        module = child_of(module, part, path)
    return module


def child_of(module: nn.Module | list, part: str, path: str) -> nn.Module | list:
    try:
        return module[int(part)] if isinstance(module, list) else module[part]
    except (KeyError, IndexError, ValueError, TypeError):
        raise UserError(f"no module has the path {path!r}: {part!r} leads nowhere") from None


def set_module(model: nn.Module, path: str, replacement: nn.Module) -> None:
    """Puts a module in the place of the one with that path."""
    parent_path, _, name = path.rpartition(".")
    parent = module_at(model, parent_path) if parent_path else model
    child_of(parent, name, path)
    parent[int(name) if isinstance(parent, list) else name] = replacement


@contextmanager
def replaced(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Modules in the place of others while the context lasts; the real ones come back whatever
    happens."""
    originals = {path: module_at(model, path) for path in replacements}
    try:
        for path, module in replacements.items():
            set_module(model, path, module)
        yield
    finally:
        for path, module in originals.items():
            set_module(model, path, module)
