"""INT8 linears in the place of a model's own, under one scope, and the order of loading them.

A quantized checkpoint is loaded replace → load → cast: its codes need layers that take them, and
a cast that comes first would round them. A 16-bit checkpoint is loaded load → replace → cast, so
that the codes are those of the checkpoint's own values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import UserError
from ..store import load_folder, load_tensors
from .config_file import read_config
from .int8 import PROTECTED, INT8Linear
from .int8_operators import AUTO, check_backend

SCOPE = "blocks"
ADAPTER = "lora_a"  # what every run-time LoRA layer holds, MLX's and ours
BLOCK_NAME = "quantization"


def collect_replace_targets(
    model: nn.Module, scope_attr: str = SCOPE, skip_keywords: Sequence[str] = ()
) -> dict[str, nn.Linear]:
    """The linears under `model.scope_attr` by dotted path, in the order of the modules.

    The scope may be a dotted path. A linear is left out where its path contains a keyword; if
    none is left, that is an error.
    """
    skip = keywords_of(skip_keywords)
    found = modules_in_order(scope_of(model, scope_attr), scope_attr)
    for path, module in found.items():
        if ADAPTER in module:
            raise UserError(
                f"{path} has a LoRA adapter that is applied at run time, which INT8 cannot take: "
                "the adapter's weight would have to be added to codes; fold it in before "
                "quantizing, with merge_lora(model, file, scale)"
            )
    linears = {path: m for path, m in found.items() if isinstance(m, nn.Linear)}
    targets = {path: m for path, m in linears.items() if not any(word in path for word in skip)}
    if not targets:
        raise UserError(nothing_matched(scope_attr, linears, found, skip))
    return targets


def replace_linear_with_int8(
    model: nn.Module,
    scope_attr: str = SCOPE,
    quantize: bool = True,
    skip_keywords: Sequence[str] = (),
    *,
    backend: str = AUTO,
    block_size: int = 0,
    one_by_one: bool = False,
) -> list[str]:
    """Puts INT8 layers in the place of the scope's linears; returns their paths.

    Without `quantize` they are shells, which a quantized checkpoint is loaded into. All is
    checked before the first layer changes. With `one_by_one` a weight is read and checked when its
    turn comes, so that of those not yet read one alone is in memory in floats; a model that is
    refused then is to be thrown away.
    """
    check_backend(backend)
    targets = collect_replace_targets(model, scope_attr, skip_keywords)
    for path, linear in targets.items():
        check_target(path, linear, quantize and not one_by_one, block_size)
    paths = list(targets)
    for path in paths:
        linear = targets.pop(path)  # so that the floats are let go one by one
        if quantize:
            layer = quantized_layer(path, linear, backend, block_size)
        else:
            rows, columns = linear.weight.shape
            layer = INT8Linear.shell(
                rows, columns, bias="bias" in linear, block_size=block_size, backend=backend
            )
        model.update_modules(tree_unflatten([(path, layer)]))
    return paths


def quantized_layer(path: str, linear: nn.Linear, backend: str, block_size: int) -> INT8Linear:
    try:
        return INT8Linear.from_linear(linear, backend, block_size=block_size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_target(path: str, linear: nn.Linear, read: bool, block_size: int) -> None:
    columns = linear.weight.shape[1]
    if block_size < 0 or (block_size and columns % block_size):
        raise UserError(
            f"block size {block_size} does not divide the {columns} input channels of {path}; "
            "give one that does, or leave the layer out by a keyword"
        )
    if read and not bool(mx.isfinite(linear.weight).all()):
        raise UserError(f"{path} holds weights that are NaN or infinite; give a sound checkpoint")


def scope_of(model: nn.Module, scope_attr: str) -> Any:
    """What the dotted path leads to."""
    here: Any = model
    for part in scope_attr.split("."):
        try:
            here = here[int(part)] if isinstance(here, list) else here[part]
        except (KeyError, IndexError, ValueError, TypeError):
            names = range(len(here)) if isinstance(here, list) else children_of(here)
            valid = ", ".join(map(str, names)) or "none"
            raise UserError(
                f"scope_attr {scope_attr!r} leads nowhere at {part!r}; valid here: {valid}"
            ) from None
    return here


def children_of(module: Any) -> dict[str, Any]:
    """What a module, list or dict holds that may hold modules, in the order of definition."""
    items = enumerate(module) if isinstance(module, (list, tuple)) else module.items()
    return {
        str(name): child
        for name, child in items
        if isinstance(child, (nn.Module, list, tuple, dict)) and not str(name).startswith("_")
    }


def modules_in_order(root: Any, path: str) -> dict[str, nn.Module]:
    """Every module from the root down, parents first; MLX's own listing goes backwards."""
    found = {path: root} if isinstance(root, nn.Module) else {}
    if isinstance(root, (nn.Module, list, tuple, dict)):
        for name, child in children_of(root).items():
            found |= modules_in_order(child, f"{path}.{name}")
    return found


def keywords_of(words: Sequence[str]) -> tuple[str, ...]:
    """One string would be taken letter by letter, and an empty word is in every path."""
    if isinstance(words, str) or not all(isinstance(word, str) and word for word in words):
        raise UserError(f"skip_keywords is {words!r}; valid: a list of words that are not empty")
    return tuple(words)


def nothing_matched(
    scope: str, linears: Mapping[str, Any], found: Mapping[str, nn.Module], skip: Sequence[str]
) -> str:
    if linears:
        words = ", ".join(map(repr, skip))
        return (
            f"all {len(linears)} linears under {scope!r} have one of {words} in their path (first: "
            f"{next(iter(linears))}); give other skip_keywords"
        )
    if any(isinstance(module, INT8Linear) for module in found.values()):
        return f"the linears under {scope!r} are INT8 already; replace them once only"
    return f"there is no linear under {scope!r}; give another scope_attr"


@dataclass(frozen=True)
class QuantizationBlock:
    """The block `quantization:` of a configuration; off unless it is asked for."""

    enabled: bool = False
    checkpoint_is_quantized: bool = False
    scope_attr: str = SCOPE
    skip_keywords: tuple[str, ...] = ()

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any] | None) -> QuantizationBlock:
        """From a JSON or YAML file, which must have one, or from what such a file holds, where no
        block is one that is off."""
        where = "the configuration" if isinstance(source, Mapping) else str(source)
        held = read_config(source) if isinstance(source, (str, Path)) else source or {}
        if isinstance(source, (str, Path)) and BLOCK_NAME not in held:
            has = ", ".join(map(str, held)) or "nothing"
            raise UserError(
                f"{where} has no table {BLOCK_NAME!r}, only {has}; put the settings there"
            )
        block = held.get(BLOCK_NAME)
        block = {} if block is None else block
        if not isinstance(block, Mapping):
            raise UserError(f"{where}: {BLOCK_NAME} is {block!r}; valid: a table of its settings")
        names = [field.name for field in fields(cls)]
        if unknown := [str(name) for name in block if name not in names]:
            raise UserError(
                f"{where}: {BLOCK_NAME}.{unknown[0]} is unknown; valid: {', '.join(names)}"
            )
        made = cls(**block)
        for name in ("enabled", "checkpoint_is_quantized"):
            if not isinstance(getattr(made, name), bool):
                value = getattr(made, name)
                raise UserError(f"{where}: {BLOCK_NAME}.{name} is {value!r}; valid: true or false")
        if not isinstance(made.scope_attr, str) or not made.scope_attr:
            raise UserError(
                f"{where}: {BLOCK_NAME}.scope_attr is {made.scope_attr!r}; valid: the name of "
                "what holds the blocks"
            )
        words = made.skip_keywords
        if not isinstance(words, (list, tuple)):
            raise UserError(f"{where}: skip_keywords is {words!r}; valid: a list of words")
        return cls(**{**block, "skip_keywords": keywords_of(words)})


class OtherKind(UserError):
    """A checkpoint that is not what the block says of it; `what` is the message but the way out."""

    def __init__(self, what: str, way_out: str, *, is_int8: bool) -> None:
        super().__init__(f"{what}; {way_out}")
        self.what, self.is_int8 = what, is_int8


# A safetensors file, a folder of them, tensors by the model's own names, or what gives these.
Checkpoint = str | Path | Mapping[str, mx.array] | Callable[[], Mapping[str, mx.array]]


def prepare_int8(
    model: nn.Module,
    block: QuantizationBlock,
    checkpoint: Checkpoint | None = None,
    *,
    dtype: mx.Dtype | None = None,
    backend: str = AUTO,
) -> list[str]:
    """What the block asks for, in the order that it needs; returns the INT8 layers' paths.

    A model whose 16-bit weights are there already needs no checkpoint. `dtype` is what all else is
    cast to. Tensors of a file are read one by one, and as floats let go at once; a mapping holds on
    to those that it has. A model that is refused may be half replaced.
    """
    order = LoadOrder(model, block, backend)
    if checkpoint is None and block.enabled and block.checkpoint_is_quantized:
        raise UserError(
            "checkpoint_is_quantized is true, and no checkpoint was given to load into the empty "
            "INT8 layers; give the quantized file"
        )
    tensors = {} if checkpoint is None else tensors_of(checkpoint)
    for step in order.steps:
        if step == "replace":
            order.replace()
        elif step == "load" and checkpoint is not None:
            order.load(tensors)
            tensors = {}  # or what is read now would be kept
        elif step == "cast" and dtype is not None:
            order.cast(dtype)
    return order.paths


def tensors_of(checkpoint: Checkpoint) -> Mapping[str, mx.array]:
    if isinstance(checkpoint, Mapping):
        return checkpoint
    if callable(checkpoint):
        return checkpoint()
    path = Path(checkpoint)
    return load_folder(path) if path.is_dir() else load_tensors(path)


class LoadOrder:
    """The steps of loading one model, which refuse to be taken in another order."""

    def __init__(self, model: nn.Module, block: QuantizationBlock, backend: str = AUTO) -> None:
        self.model, self.block, self.backend = model, block, backend
        self.paths: list[str] = []  # of the INT8 layers, once replaced
        self._taken: list[str] = []

    @property
    def steps(self) -> tuple[str, ...]:
        """In the order that the block needs."""
        if not self.block.enabled:
            return ("load", "cast")
        if self.block.checkpoint_is_quantized:
            return ("replace", "load", "cast")
        return ("load", "replace", "cast")

    def replace(self) -> None:
        """INT8 layers, or shells of them, in the place of the scope's linears."""
        self._take("replace")
        self.paths = replace_linear_with_int8(
            self.model,
            self.block.scope_attr,
            not self.block.checkpoint_is_quantized,
            self.block.skip_keywords,
            backend=self.backend,
            one_by_one=True,
        )

    def load(self, tensors: Mapping[str, mx.array]) -> None:
        """The checkpoint's tensors, under the model's own names, all of them and no others."""
        self._take("load")
        if self.block.enabled and self.block.checkpoint_is_quantized:
            self._fit_shells(tensors)
        check_kinds(self.model, tensors)
        self.model.load_weights(list(tensors.items()))

    def cast(self, dtype: mx.Dtype) -> None:
        """All that is not a code or a scale."""
        self._take("cast")
        self.model.set_dtype(dtype)

    def _fit_shells(self, tensors: Mapping[str, mx.array]) -> None:
        """As many blocks of scales as the checkpoint has; floats where it has kept those."""
        kept = {path: shape_of(tensors.get(f"{path}.weight_scale")) for path in self.paths}
        if all(scale is None for scale in kept.values()):
            raise OtherKind(
                f"the checkpoint has no INT8 codes of {self.paths[0]} or any other layer of "
                f"{self.block.scope_attr!r}",
                "say checkpoint_is_quantized: false, and it is quantized while it is loaded",
                is_int8=False,
            )
        layers = []
        for path, scale in kept.items():
            shell = scope_of(self.model, path)
            (rows, columns), bias = shell.weight.shape, "bias" in shell
            if scale is None:
                layers.append((path, nn.Linear(columns, rows, bias)))
            elif len(scale) == 2 and scale[1] > 1 and columns % scale[1] == 0:
                size = columns // scale[1]
                layer = INT8Linear.shell(
                    rows, columns, bias=bias, block_size=size, backend=self.backend
                )
                layers.append((path, layer))
        self.model.update_modules(tree_unflatten(layers))
        self.paths = [path for path, scale in kept.items() if scale is not None]

    def _take(self, step: str) -> None:
        """Raises, with the reason, unless it is the step's turn."""
        if step not in self.steps:
            raise UserError("nothing is to be replaced: quantization.enabled is false")
        if step in self._taken:
            raise UserError(f"{step} was done already; each step is taken once")
        place, quantized = self.steps.index(step), self.block.checkpoint_is_quantized
        # The 16-bit weights may be in the model already.
        needed = [s for s in self.steps[:place] if s != "load" or quantized]
        early = [s for s in needed if s not in self._taken]
        late = [s for s in self.steps[place + 1 :] if s in self._taken]
        if self.block.enabled and (early or late):
            first, second = (early[0], step) if early else (step, late[0])
            raise UserError(
                f"{second} before {first} is refused: {self._reason(first, second)}; the order is "
                f"{' → '.join(self.steps)}"
            )
        self._taken.append(step)

    def _reason(self, first: str, second: str) -> str:
        if second == "cast":
            return "the cast would round what is quantized or loaded after it"
        if first == "replace":
            return "a quantized checkpoint's codes need INT8 layers that take them"
        return "the codes would be those of weights that the checkpoint then replaces"


def shape_of(tensor: mx.array | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def check_kinds(model: nn.Module, tensors: Mapping[str, mx.array]) -> None:
    """Raises where the checkpoint and the model do not fit, before anything is loaded."""
    own = dict(tree_flatten(model.parameters()))
    missing, extra = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    scaled = [name for name in extra if name.endswith(f".{PROTECTED[1]}")]
    if scaled:
        raise OtherKind(
            f"the checkpoint is INT8 at {scaled[0].rpartition('.')[0]}, where the model has a "
            "linear of 16 bits",
            "say checkpoint_is_quantized: true, and the scope and keywords that it was converted "
            "with",
            is_int8=True,
        )
    if missing or extra:
        name, what = (missing[0], "lacks") if missing else (extra[0], "has, beyond the model's,")
        raise UserError(
            f"the checkpoint {what} {name} ({len(missing)} missing, {len(extra)} too many); give "
            "one of this model"
        )
    for name, tensor in tensors.items():
        held = own[name]
        integers = (mx.issubdtype(t.dtype, mx.integer) for t in (held, tensor))
        exact = any(integers) or name.endswith(f".{PROTECTED[1]}")
        if tensor.shape != held.shape or (exact and tensor.dtype != held.dtype):
            raise UserError(
                f"{name} of the checkpoint is {tensor.dtype} of shape {tuple(tensor.shape)}, the "
                f"model needs {held.dtype} of {tuple(held.shape)}"
            )
