"""A name or a path to a pipeline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from ..errors import UserError
from ..store import read_json
from .checkpoints import load_transformer
from .nano.assembly import load_folder_pipeline, tiny_pipeline
from .pipeline import Pipeline
from .sd3_files import PUBLISHED
from .sd3_load import load_sd3
from .sd3_text import Text

NANO = Path(__file__).parent / "nano" / "weights"
SD3 = tuple(PUBLISHED)
RANDOM = ("tiny", "tiny-3.5-medium", "tiny-3.5-large")
MODELS = ("nano", *SD3, *RANDOM)


@dataclass(frozen=True)
class ModelChoice:
    """Which model, where a name alone does not say it: what `--checkpoint` and `--t5` add."""

    name: str | None = None  # none: the one that earlier stages used, or what the checkpoint holds
    checkpoint: Path | None = None
    text: Text = Text()
    for_all: bool = False  # the checkpoint was given for all commands at once, whatever their model

    def __str__(self) -> str:
        return str(self.name or self.checkpoint or "the model")

    def __fspath__(self) -> str:
        """So that it is a path wherever a model's name may be the path of its folder."""
        return str(self)


Model = str | ModelChoice


def chosen(model: Model | None, recorded: str) -> Model:
    """What the user asked for; where that names no model, the one that was recorded."""
    if isinstance(model, ModelChoice) and model.name is None:
        if model.checkpoint is None:
            return replace(model, name=recorded)
        if model.for_all and recorded not in SD3:
            return replace(model, name=recorded, checkpoint=None)
    return model or recorded


def defaulted(model: Model | None, default: str) -> Model:
    """What the user asked for; the default where that is neither a model nor a checkpoint."""
    if isinstance(model, ModelChoice) and model.name is None and model.checkpoint is not None:
        return model
    return chosen(model, default)


def default_dtype(name: str = "") -> mx.Dtype:
    """float32 on the CPU, where 16-bit products are slow; elsewhere float16, or bfloat16 for
    SD3.5, whose values float16 does not hold."""
    if mx.default_device() == mx.Device(mx.cpu):
        return mx.float32
    return mx.bfloat16 if name.startswith("sd3.5") else mx.float16


def load_pipeline(
    model: Model | None,
    dtype: mx.Dtype | None = None,
    *,
    checkpoint: str | Path | None = None,
    t5: bool | None = None,
    text_bits: int | None = None,
) -> Pipeline:
    """The pipeline of that name, or in that folder.

    `checkpoint` is a Stable Diffusion 3 on this machine, in any published layout: no network is
    touched. With `t5=False` its third text encoder is left out; `text_bits` quantizes all three.
    """
    if not isinstance(model, ModelChoice):
        place = None if checkpoint is None else Path(checkpoint)
        model = ModelChoice(model, place, Text(t5, text_bits))
    if model.name in SD3 or model.checkpoint is not None:
        return load_stable_diffusion(model, dtype)
    if model.text != Text():
        raise UserError(
            f"{model} has neither CLIP nor T5; --t5 and --quantize-text-encoders are for "
            f"{', '.join(SD3)}"
        )
    return load_own(str(model), dtype or default_dtype())


def load_stable_diffusion(model: ModelChoice, dtype: mx.Dtype | None) -> Pipeline:
    if model.name not in (None, *SD3):
        raise UserError(f"--checkpoint is for {', '.join(SD3)}; {model.name} has its own weights")
    return load_sd3(
        model.name, lambda name: dtype or default_dtype(name), model.checkpoint, model.text
    )


def load_own(model: str, dtype: mx.Dtype) -> Pipeline:
    """nano, a random model, or one in a folder."""
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
        if (path / "transformer").is_dir():
            raise UserError(
                f"{model} is the folder of a Stable Diffusion 3's pipeline; give it with "
                f"--checkpoint {model}"
            )
        raise UserError(
            f"{model} holds a transformer without text encoder and codec; "
            f"valid models: {', '.join(MODELS)}, or a folder with a pipeline's config.json; "
            "a Stable Diffusion 3 is given with --checkpoint"
        )
    raise UserError(
        f"unknown model {model!r}; valid: {', '.join(MODELS)}, or the path of a pipeline's folder"
    )
