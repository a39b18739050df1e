"""A quantized model as an mlx-lm style folder, and back.

config.json          `quantization` as mlx-lm writes it, and all that only we read under `ditq`
model.safetensors    the transformer, or shards of 5 GB and their index: what MLX's layers read
ditq.safetensors     activation grids, shifts, smoothing: `PATH.a_scale`, PATH a linear path
text_encoder.safetensors, codec.safetensors   the other parts of a pipeline, where it has them
README.md            the model card

Of a Stable Diffusion 3 the first three lie in transformer/, beside text_encoder/ and the others.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import UserError
from ..models.mmdit import MMDiT
from ..models.nano.assembly import CaptionEncoder
from ..models.pipeline import Pipeline
from ..models.sd3_save import companion_bytes, save_companions
from ..models.sd3_text import SD3TextEncoder
from ..quant.linear import QuantizedLinear
from ..quant.stored import StoredLayer, store_layer
from ..store import (
    folder_lock,
    hash_file,
    require_space,
    save_folder,
    save_tensors,
    write_bytes,
    write_json,
)
from ..store.files import os_error
from .card import model_card
from .saved import CARD, CONFIG, FORMAT, OWN, TRANSFORMER, VERSION, is_saved, table_schedule


def save_model(
    pipeline: Pipeline,
    folder: str | Path,
    *,
    made_from: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Writes the pipeline as it is, quantized layers and all; `load_saved` gives it back.

    `made_from` (hashes of the artifacts) and `settings` are recorded and shown on the model card.
    The folder appears as a whole or not at all; one that holds another saved model is replaced
    with `force` only.
    """
    parts = companions(pipeline)
    described = {
        "made_from": {"model": pipeline.name, "model_hash": pipeline.hash, **(made_from or {})},
        "settings": dict(settings or {}),
        "sampling": asdict(pipeline.defaults),
        **{name: asdict(part.config) for name, part in parts.items()},
    }
    if isinstance(pipeline.encode_text, SD3TextEncoder):
        return save_stable_diffusion(pipeline, Path(folder), described, force)
    return save_parts(pipeline.transformer, parts, Path(folder), described, force)


def save_stable_diffusion(
    pipeline: Pipeline, folder: Path, described: Mapping[str, Any], force: bool
) -> Path:
    """One folder a component, as diffusers has them; recorded is whether T5 is one of them."""
    described = {**described, "t5": pipeline.encode_text.text.t5}
    with new_folder(folder, force) as partial:
        more = companion_bytes(pipeline.encode_text, pipeline.codec)
        beside, inner = Beside(folder.resolve().name, more), partial / TRANSFORMER
        save_parts(pipeline.transformer, {}, inner, described, False, beside)
        os.replace(inner / CARD, partial / CARD)
        save_companions(pipeline.encode_text, pipeline.codec, partial)
        (partial / f".{TRANSFORMER}.lock").unlink(missing_ok=True)
    return folder


def save_transformer(
    transformer: MMDiT,
    folder: str | Path,
    *,
    made_from: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """The same for a transformer whose text encoders and codec lie elsewhere."""
    made_from = {"model": "a transformer", **(made_from or {})}
    described = {"made_from": made_from, "settings": dict(settings or {})}
    return save_parts(transformer, {}, Path(folder), described, force)


def companions(pipeline: Pipeline) -> dict[str, nn.Module]:
    """Text encoder and codec, which travel along where they are this project's own."""
    if not isinstance(pipeline.encode_text, CaptionEncoder):
        return {}
    return {"text_encoder": pipeline.encode_text.encoder, "codec": pipeline.codec}


@dataclass(frozen=True)
class Beside:
    """What a transformer's folder will lie beside, in the folder of the whole model."""

    title: str  # the model's
    bytes: int


def save_parts(
    transformer: MMDiT,
    parts: Mapping[str, nn.Module],
    folder: Path,
    described: Mapping[str, Any],
    force: bool,
    beside: Beside | None = None,
) -> Path:
    layers = quantized_layers(transformer)
    if not layers:
        raise UserError("the model has no quantized layer; there is nothing to save")
    tensors, own = transformer_tensors(transformer, layers)
    needed = sum(t.nbytes for t in [*tensors.values(), *own.values()])
    title = folder.resolve().name if beside is None else beside.title
    needed += 0 if beside is None else beside.bytes
    require_space(folder.parent, needed, f"the model {title}")
    with new_folder(folder, force) as partial:
        save_folder(partial, tensors)
        save_tensors(partial / OWN, own)
        for name, part in parts.items():
            save_tensors(partial / f"{name}.safetensors", narrowed_parameters(part))
        table = quantization(transformer, layers)
        details = {
            "format": FORMAT,
            "version": VERSION,
            "transformer": transformer.config.to_dict(),
            "layers": {path: {"groups": layer.groups} for path, layer in layers.items()},
            **activations(transformer),
            **described,
        }
        details["files"] = {
            path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)}
            for path in sorted(partial.iterdir())
        }
        inner, whole = "" if beside is None else f"{TRANSFORMER}/", bool(parts or beside)
        card = model_card(title, details, table, whole, inner)
        write_bytes(partial / CARD, card.encode())
        config = {"model_type": "mmdit", "quantization": table, "quantization_config": table}
        write_json(partial / CONFIG, {**config, "ditq": details})
    return folder


def quantized_layers(transformer: MMDiT) -> dict[str, StoredLayer]:
    """Our own quantized layers by path, as they are stored."""
    return {
        path: store_layer(module)
        for path, module in sorted(transformer.named_modules(), key=lambda item: item[0])
        if isinstance(module, QuantizedLinear)
    }


def transformer_tensors(
    transformer: MMDiT, layers: Mapping[str, StoredLayer]
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """What MLX's layers read, and what only ours do, by name."""
    tensors = {
        name: tensor
        for name, tensor in narrowed_parameters(transformer).items()
        if name.rpartition(".")[0] not in layers
    }
    own = {}
    for path, layer in layers.items():
        tensors |= {f"{path}.{name}": tensor for name, tensor in layer.affine.items()}
        own |= {f"{path}.{name}": tensor for name, tensor in layer.own.items()}
        if "bias" in layer.affine:
            tensors[f"{path}.bias"] = narrowed(layer.affine["bias"])
    return tensors, own


def narrowed_parameters(module: nn.Module) -> dict[str, mx.array]:
    return {name: narrowed(tensor) for name, tensor in tree_flatten(module.parameters())}


def narrowed(tensor: mx.array) -> mx.array:
    """In 16 bits where these hold every value: on the CPU 16-bit weights are kept in float32."""
    if tensor.dtype != mx.float32:
        return tensor
    for dtype in (mx.float16, mx.bfloat16):
        narrow = tensor.astype(dtype)
        if mx.array_equal(narrow.astype(mx.float32), tensor):
            return narrow
    return tensor


def quantization(transformer: MMDiT, layers: Mapping[str, StoredLayer]) -> dict[str, Any]:
    """mlx-lm's table: the most frequent format, and by path those of all other layers."""
    formats = {path: (layer.group_size, layer.bits) for path, layer in layers.items()}
    common = Counter(formats.values()).most_common(1)[0][0]
    for path, module in transformer.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            formats[path] = (module.group_size, module.bits)
    table: dict[str, Any] = {"group_size": common[0], "bits": common[1], "mode": "affine"}
    for path, (size, bits) in sorted(formats.items()):
        if (size, bits) != common:
            table[path] = {"group_size": size, "bits": bits}
    return table


def activations(transformer: MMDiT) -> dict[str, Any]:
    """How the layers run, which all of them share; no sigmas where activations stay in floats."""
    layers = [m for _, m in transformer.named_modules() if isinstance(m, QuantizedLinear)]
    runtime, schedule = layers[0].runtime, table_schedule(transformer)
    return {
        "a_scale": runtime.a_scale,
        "weights_only": runtime.weights_only,
        "sigmas": None if schedule is None else list(schedule.sigmas),
    }


@contextmanager
def new_folder(folder: Path, force: bool) -> Iterator[Path]:
    """A folder to fill, which takes the name of `folder` when it is finished."""
    target = folder.resolve()
    check_target(target, force)
    partial, old = (target.with_name(f".{target.name}.{end}") for end in ("partial", "old"))
    with folder_lock(target.parent, f".{target.name}.lock"):
        try:
            for leftover in (partial, old):
                if leftover.exists():
                    shutil.rmtree(leftover)
            partial.mkdir(parents=True)
            yield partial
            if target.exists() and any(target.iterdir()):
                os.rename(target, old)
            os.rename(partial, target)
        except OSError as error:
            raise os_error(error, target, "write") from error
        finally:
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)


def check_target(folder: Path, force: bool) -> None:
    """Raises where a model cannot be saved without the loss of something else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; choose the name of a new folder")
    if not any(folder.iterdir()):
        return
    if not is_saved(folder):
        raise UserError(
            f"{folder} holds something else than a saved model; choose a new or empty folder"
        )
    if not force:
        raise UserError(
            f"{folder} holds a saved model already; --force replaces it, or choose another folder"
        )
