"""A name or a path to a pipeline."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from ..errors import UserError
from ..store import read_json
from .checkpoints import load_transformer
from .nano.assembly import load_folder_pipeline, tiny_pipeline
from .pipeline import Pipeline

NANO = Path(__file__).parent / "nano" / "weights"
RANDOM = ("tiny", "tiny-3.5-medium", "tiny-3.5-large")
MODELS = ("nano", *RANDOM)


def default_dtype() -> mx.Dtype:
    """float32 on the CPU, where 16-bit products are slow; float16 elsewhere."""
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.float16


def load_pipeline(model: str, dtype: mx.Dtype | None = None) -> Pipeline:
    """The pipeline of that name, or in that folder."""
    dtype = dtype or default_dtype()
    if model in RANDOM:
        return tiny_pipeline(dtype, model)
    path = NANO if model == "nano" else Path(model)
    if (path / "config.json").is_file():
        if "ditq" in read_json(path / "config.json"):
            raise UserError(
                f"{model} holds a quantized model, which `ditq generate` runs; give the 16-bit "
                "model that it was made from"
            )
        return load_folder_pipeline(path, dtype)
    if path.exists():
        load_transformer(path)  # names what is wrong with a checkpoint of another architecture
        raise UserError(
            f"{model} holds a transformer without text encoder and codec; "
            f"valid models: {', '.join(MODELS)}, or a folder with a pipeline's config.json"
        )
    raise UserError(
        f"unknown model {model!r}; valid: {', '.join(MODELS)}, or the path of a pipeline's folder"
    )
