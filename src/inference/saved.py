"""Opens what `save_model` wrote: every file is checked before the first layer is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..backends import MLX_BITS, Backend, named
from ..backends.weight import MLX_GROUP_SIZES
from ..errors import UserError
from ..models.checkpoints import POSITIONS, fill, infer_config, read_weights
from ..models.configs import MMDiTConfig
from ..models.load import MODELS, Model, ModelChoice, default_dtype, load_pipeline
from ..models.mmdit import MMDiT
from ..models.nano.assembly import assemble, part, settings
from ..models.nano.codec import Codec, CodecConfig
from ..models.nano.text import TextConfig, TextEncoder
from ..models.paths import module_at
from ..models.pipeline import Defaults, Pipeline
from ..models.sd3_files import Files, files_of
from ..models.sd3_load import SD3, assemble_sd3, family
from ..quant.linear import TYPICAL_ROWS, QuantizedLinear, Runtime
from ..quant.schedule import Schedule, Step
from ..quant.stored import own_shapes, restore_layer
from ..store import (
    check_expected,
    hash_file,
    hash_json,
    load_folder,
    load_tensors,
    read_json,
    short_hash,
)
from ..store.arrays import dtype_name
from ..store.files import check_relative_name, damaged
from ..store.jsonfile import check_header
from .kernels import join, rows_of

FORMAT, VERSION = "ditq-saved-model", 1
CONFIG, OWN, CARD = "config.json", "ditq.safetensors", "README.md"
TRANSFORMER = "transformer"  # where it is of several folders
HINT = "save it again with `python -m src.load_adaround_model --save`"


def open_pipeline(
    model: Model, dtype: mx.Dtype | None = None, *, kernel: str | None = None
) -> Pipeline:
    """A saved model's pipeline, or a 16-bit one by name or path; `kernel` is for saved ones."""
    if is_saved(model):
        return load_saved(model, dtype, kernel=kernel)
    if kernel is not None:
        raise UserError(
            f"--kernel {kernel} is for saved quantized models, {model} is none; leave it out"
        )
    return load_pipeline(model, dtype)


def is_saved(model: Model | Path) -> bool:
    """Whether it is the folder of a quantized model that was saved, and no model's name."""
    folder = model.name if isinstance(model, ModelChoice) else model
    if folder is None or folder in MODELS:
        return False
    path = transformer_folder(Path(folder)) / CONFIG
    return path.is_file() and isinstance(read_json(path).get("ditq"), dict)


def transformer_folder(folder: Path) -> Path:
    """Of a saved model: its own folder, or its transformer/, beside which the other parts lie."""
    inner = folder / TRANSFORMER
    return inner if (inner / CONFIG).is_file() and not (folder / CONFIG).is_file() else folder


def load_saved(
    model: Model, dtype: mx.Dtype | None = None, *, kernel: str | None = None
) -> Pipeline:
    """The pipeline in the folder; without a kernel each layer takes the machine's fastest."""
    folder = transformer_folder(Path(model))
    details, _ = read_details(folder)
    dtype = dtype or default_dtype(details["made_from"]["model"])
    if details["made_from"]["model"] in SD3:
        return load_stable_diffusion(model, folder, details, dtype, kernel)
    if "text_encoder" not in details:
        raise UserError(
            f"{folder} holds a transformer without text encoder and codec, which pictures need"
        )
    transformer = load_saved_transformer(folder, dtype, kernel=kernel)
    text = TextEncoder(settings(TextConfig, part(details, "text_encoder", folder), folder))
    codec = Codec(settings(CodecConfig, part(details, "codec", folder), folder))
    for name, module in (("text_encoder", text), ("codec", codec)):
        path = folder / f"{name}.safetensors"
        fill(module, load_tensors(path), path)
    defaults = settings(Defaults, part(details, "sampling", folder), folder)
    hashes = {name: entry["sha256"] for name, entry in details["files"].items()}
    name, positions = details["made_from"]["model"], transformer.x_pos_embedder.pos_embed.weight
    pipeline = assemble(name, hash_json(hashes), transformer, text, codec, defaults, dtype)
    transformer.x_pos_embedder.pos_embed.weight = positions  # not widened, see fill_rest
    return pipeline


def load_stable_diffusion(
    model: Model, folder: Path, details: Mapping[str, Any], dtype: mx.Dtype, kernel: str | None
) -> Pipeline:
    """A saved transformer with the parts beside it, or with those of a checkpoint or the hub."""
    choice = model if isinstance(model, ModelChoice) else ModelChoice(model)
    name, files = details["made_from"]["model"], Files(folder, (folder.parent,), folder.parent)
    whole = all(files.part(part) is not None for part in ("clip_l", "clip_g", "vae"))
    own = choice.checkpoint is None or (choice.for_all and whole)
    if not own:
        files = files_of(choice.checkpoint, name)
        found = family(infer_config(read_weights(files.transformer), files.transformer))
        if found != name:
            raise UserError(f"{files.transformer} is {found}, and {folder} was made from {name}")
    transformer = load_saved_transformer(folder, dtype, kernel=kernel)
    hashes = {name: entry["sha256"] for name, entry in details["files"].items()}
    defaults = settings(Defaults, part(details, "sampling", folder), folder)
    text = choice.text
    if own and text.t5 is None:
        there = files.part("t5") is not None  # older folders do not tell
        text = replace(text, t5=details.get("t5", there))
    return assemble_sd3(name, hash_json(hashes), transformer, files, dtype, text, defaults)


def load_saved_transformer(
    folder: str | Path, dtype: mx.Dtype | None = None, *, kernel: str | None = None
) -> MMDiT:
    """The transformer in the folder; MLX reads a tensor when it is first used."""
    folder, dtype = Path(folder), dtype or default_dtype()
    backend = None if kernel is None else named(kernel)
    details, table = read_details(folder)
    check_files(folder, details["files"])
    transformer = MMDiT(MMDiTConfig.from_dict(part(details, "transformer", folder)))
    tensors, own = load_folder(folder), load_tensors(folder / OWN)
    formats = quantized_formats(folder, transformer, tensors, table)
    check_tensors(folder, transformer, tensors, own, formats)
    check_layers(folder, transformer, details["layers"], own, formats)
    runtime, replacements = runtime_of(folder, details, backend), []
    tokens = rows_of_saved(folder, details, transformer.config)
    for path, (size, bits) in formats.items():
        if path in details["layers"]:
            groups = details["layers"][path]["groups"]
            affine, extra = below(tensors, path), below(own, path)
            try:
                own_runtime = replace(runtime, rows=tokens(path))
                layer = restore_layer(bits, groups, affine, extra, own_runtime, dtype)
            except UserError as error:
                raise UserError(f"{folder}: {path}: {error}") from None
        else:
            rows, columns = module_at(transformer, path).weight.shape
            layer = nn.QuantizedLinear(columns, rows, f"{path}.bias" in tensors, size, bits)
        replacements.append((path, layer))
    transformer.update_modules(tree_unflatten(replacements))
    fill_rest(transformer, tensors, details["layers"], folder, dtype)
    transformer.follow(runtime.step)
    join(transformer)
    return transformer


def reread_saved(model: Model | Path) -> Callable[[], Mapping[str, mx.array]]:
    """How `low_memory` reads the weights of a pipeline from this folder again."""
    return partial(load_folder, transformer_folder(Path(model)))


def check_sigmas(transformer: MMDiT, sigmas: Sequence[float]) -> None:
    """Raises for noise levels outside those that the activations were calibrated at."""
    schedule = table_schedule(transformer)
    quantizes = any(
        not layer.runtime.weights_only
        for _, layer in transformer.named_modules()
        if isinstance(layer, QuantizedLinear)
    )
    if schedule is not None and quantizes:
        schedule.check(sigmas)


def table_schedule(transformer: MMDiT) -> Schedule | None:
    """The noise levels that the layers' tables are about; none without quantized activations."""
    for _, layer in transformer.named_modules():
        if isinstance(layer, QuantizedLinear) and layer.grid is not None:
            return layer.runtime.step.schedule
    return None


def read_details(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.json says under `ditq`, and its table of quantization."""
    path = folder / CONFIG
    config = read_json(path, hint=HINT)
    details, table = config.get("ditq"), config.get("quantization")
    if not isinstance(details, dict) or not isinstance(table, dict):
        raise UserError(f"{path} is not that of a model saved by this package; {HINT}")
    check_header(path, details, FORMAT, VERSION, HINT)
    try:
        sound = (
            isinstance(details["made_from"]["model"], str)
            and all(
                type(k["groups"]) is int and k["groups"] > 0 for k in details["layers"].values()
            )
            and all({"bytes", "sha256"} <= set(entry) for entry in details["files"].values())
            and {"model.safetensors", "model.safetensors.index.json"} & set(details["files"])
            and OWN in details["files"]
            and isinstance(details.get("t5", True), bool)
        )
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise damaged(path, "it does not say what was saved")
    return details, table


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises unless every file is the one that was saved."""
    for name, entry in files.items():
        path = folder / check_relative_name(name, folder / CONFIG)
        if path.is_file() and path.stat().st_size != entry["bytes"]:
            raise damaged(path, f"it has {path.stat().st_size} bytes of {entry['bytes']}")
        found = hash_file(path, HINT)
        if found != entry["sha256"]:
            raise damaged(
                path,
                f"its sha256 is {short_hash(found)}, {CONFIG} says "
                f"{short_hash(str(entry['sha256']))}",
            )


def quantized_formats(
    folder: Path, transformer: MMDiT, tensors: Mapping[str, mx.array], table: Mapping[str, Any]
) -> dict[str, tuple[int, int]]:
    """Group size and bits of every linear that has scales, by path."""
    formats, modules = {}, dict(transformer.named_modules())
    for name in tensors:
        path, _, last = name.rpartition(".")
        if last != "scales":
            continue
        if not isinstance(modules.get(path), nn.Linear):
            raise UserError(f"{folder} has scales of {path}, no linear of its transformer; {HINT}")
        entry = table.get(path, table)
        size, bits = entry.get("group_size"), entry.get("bits")
        if size not in MLX_GROUP_SIZES or bits not in MLX_BITS:
            raise UserError(
                f"{folder / CONFIG}: {path} has group_size {size} and bits {bits}; valid: "
                f"{sorted(MLX_GROUP_SIZES)} and {list(MLX_BITS)}"
            )
        formats[path] = (size, bits)
    return formats


def check_tensors(
    folder: Path,
    transformer: MMDiT,
    tensors: Mapping[str, mx.array],
    own: Mapping[str, mx.array],
    formats: Mapping[str, tuple[int, int]],
) -> None:
    """Raises unless the tensors are those of a transformer with these layers quantized."""
    wanted: dict[str, Any] = {}
    for name, tensor in tree_flatten(transformer.parameters()):
        path, _, last = name.rpartition(".")
        if path not in formats:
            wanted[name] = (None, tensor.shape)
        elif last == "weight":
            (rows, columns), (size, bits) = tensor.shape, formats[path]
            scales = (None, (rows, columns // size))
            wanted[name] = ("uint32", (rows, columns * bits // 32))
            wanted |= {f"{path}.scales": scales, f"{path}.biases": scales}
        elif name not in own:
            wanted[name] = (None, tensor.shape)
    # Rounding corrects biases, and so may give one to a layer that had none.
    wanted |= {
        n: (None, (None,)) for p in formats if (n := f"{p}.bias") in tensors and n not in wanted
    }
    check_expected(folder, kinds(tensors), wanted, allow_extra=False)


def check_layers(
    folder: Path,
    transformer: MMDiT,
    layers: Mapping[str, Mapping[str, int]],
    own: Mapping[str, mx.array],
    formats: Mapping[str, tuple[int, int]],
) -> None:
    """Raises unless our own layers are among the quantized ones and have vectors that fit."""
    wanted: dict[str, Any] = {}
    for path, entry in layers.items():
        if path not in formats:
            raise damaged(folder / CONFIG, f"it lists {path}, of which there are no scales")
        rows, columns = module_at(transformer, path).weight.shape
        if entry["groups"] not in (1, columns // formats[path][0]):
            raise damaged(folder / CONFIG, f"{path} cannot have {entry['groups']} groups of scales")
        shapes = own_shapes(rows, columns)
        wanted |= {n: (None, s) for k, s in shapes.items() if (n := f"{path}.{k}") in own}
    check_expected(folder / OWN, kinds(own), wanted, allow_extra=False)


def runtime_of(folder: Path, details: Mapping[str, Any], backend: Backend | None) -> Runtime:
    """How the saved layers run."""
    try:
        sigmas = details["sigmas"]
        step = None if sigmas is None else Step(Schedule(tuple(sigmas)))
        weights_only = bool(details["weights_only"])
        return Runtime(step, details["a_scale"], backend, weights_only=weights_only)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder / CONFIG, f"its activations are not described ({error})") from None


def rows_of_saved(
    folder: Path, details: Mapping[str, Any], config: MMDiTConfig
) -> Callable[[str], int]:
    """How many tokens a layer meets at once; of a transformer by itself, as many as is typical."""
    if "sampling" not in details:
        return lambda path: TYPICAL_ROWS
    return rows_of(config, settings(Defaults, part(details, "sampling", folder), folder))


def fill_rest(
    transformer: MMDiT,
    tensors: Mapping[str, mx.array],
    layers: Mapping[str, Any],
    folder: Path,
    dtype: mx.Dtype,
) -> None:
    """Loads everything but our own layers, floats in `dtype`.

    The grid of positions is large and only ever added: to float32 it is added as it is stored.
    """
    weights = []
    for name, tensor in tensors.items():
        if name.rpartition(".")[0] in layers:
            continue
        as_stored = tensor.dtype == mx.uint32 or (name == POSITIONS and dtype == mx.float32)
        weights.append((name, tensor if as_stored else tensor.astype(dtype)))
    transformer.load_weights(weights, strict=False)


def below(tensors: Mapping[str, mx.array], path: str) -> dict[str, mx.array]:
    """One layer's tensors, by the names below its path."""
    names = ("weight", "scales", "biases", *own_shapes(0, 0))
    return {name: tensors[f"{path}.{name}"] for name in names if f"{path}.{name}" in tensors}


def kinds(tensors: Mapping[str, mx.array]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
