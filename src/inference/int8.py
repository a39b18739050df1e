"""INT8 in a pipeline: what the block `quantization` asks for, by one function for all commands.

A 16-bit checkpoint is quantized while it is loaded, one layer in floats at a time; a converted one
is loaded into INT8 layers as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn

from ..conversion.format import scheme_of
from ..errors import UserError
from ..models.checkpoints import read_weights, weights_folder
from ..models.load import MODELS, NANO, SD3, Model, ModelChoice, default_dtype, load_pipeline
from ..models.mmdit import MMDiT
from ..models.nano.assembly import load_folder_pipeline
from ..models.paths import BLOCKS, MODULATION
from ..models.pipeline import Pipeline
from ..models.sd3_load import find_files, load_sd3
from ..quant.int8 import INT8Linear
from ..quant.int8_operators import AUTO, check_backend
from ..quant.replace import SCOPE, OtherKind, QuantizationBlock, prepare_int8
from ..store import hash_file, hash_json, load_tensors, read_header
from .kernels import join, rows_of
from .low_memory import Reread
from .saved import is_saved, open_pipeline, reread_saved

PRE_QUANTIZED = "loading pre-quantized INT8 checkpoint"
# What `use_int8` stands for: the layers that the converter takes too.
WHILE_LOADING = QuantizationBlock(True, False, BLOCKS, (MODULATION,))
CONVERTED = replace(WHILE_LOADING, checkpoint_is_quantized=True)
TRANSFORMER = "transformer.safetensors"  # in a pipeline's folder

# Ways out where an option was given and no block, for a checkpoint of the other kind.
LEAVE_OUT = "leave --use_int8 out, or give the file as --int8_checkpoint instead"
CONVERT = "convert it with `python -m src.convert_to_int8`, or give --use_int8 instead"

Tell = Callable[[str], object]


@dataclass(frozen=True)
class Int8:
    """What a user asks for; nothing unless told otherwise.

    `quantization` is a JSON or YAML file with the block, or what such a file holds. `use_int8`
    quantizes a 16-bit checkpoint while it is loaded. `int8_checkpoint` is a converted transformer
    that takes the place of the model's own.
    """

    quantization: str | Path | Mapping[str, Any] | None = None
    use_int8: bool = False
    int8_checkpoint: str | Path | None = None

    def block(self) -> QuantizationBlock:
        """The block that is meant, for this package's transformer; contradictions are refused."""
        block = QuantizationBlock.read(self.quantization)
        said = self.quantization is not None
        if self.use_int8 and self.int8_checkpoint is not None:
            raise UserError(
                "--use_int8 quantizes a 16-bit checkpoint, and --int8_checkpoint is quantized "
                "already; give one of them"
            )
        if self.use_int8 and block.checkpoint_is_quantized:
            raise UserError(
                "--use_int8 quantizes a 16-bit checkpoint, and the block says "
                "checkpoint_is_quantized: true; leave one of them out"
            )
        if (self.use_int8 or self.int8_checkpoint is not None) and said and not block.enabled:
            option = "--use_int8" if self.use_int8 else "--int8_checkpoint"
            raise UserError(
                f"{option} is given, and the block does not say enabled: true; say it, or leave "
                "one of them out"
            )
        if self.int8_checkpoint is not None and not said:
            block = CONVERTED
        elif self.use_int8 and not said:
            block = WHILE_LOADING
        return replace(block, scope_attr=BLOCKS) if block.scope_attr == SCOPE else block


OFF = Int8()


def open_with_int8(
    model: Model,
    dtype: mx.Dtype | None = None,
    *,
    kernel: str | None = None,
    int8: Int8 = OFF,
    tell: Tell = click.echo,
) -> Pipeline:
    """The pipeline by name or path, its transformer in INT8 where that is asked for.

    `kernel` is how INT8 layers, or those of a saved quantized model, multiply; `tell` takes the
    lines for the user.
    """
    block = block_for(model, int8)
    if not block.enabled:
        return open_pipeline(model, dtype, kernel=kernel)
    if is_saved(model):
        raise UserError(
            f"{model} is a saved model of 4-bit codes, INT8 is for models of 16 bits; leave INT8 "
            "out, or give the model that it was made from"
        )
    check_backend(kernel or AUTO)
    put = Put(int8, block, kernel or AUTO, tell)
    if (folder := folder_of(model)) is not None:
        pipeline = load_folder_pipeline(folder, dtype or default_dtype(), put.from_file)
    elif (choice := published(model)) is not None:
        dtype_of = (lambda name: dtype) if dtype is not None else default_dtype
        pipeline = load_sd3(choice.name, dtype_of, choice.checkpoint, choice.text, put.from_file)
    else:
        pipeline = load_pipeline(model, dtype)
        put.into(pipeline.transformer, int8.int8_checkpoint)
        pipeline.transformer.set_dtype(pipeline.dtype)
    rows = rows_of(pipeline.transformer.config, pipeline.defaults)
    share_work(pipeline.transformer, rows, pipeline.dtype)
    pipeline.hash = hash_of(pipeline, int8, block)
    return pipeline


def share_work(model: MMDiT, rows: Callable[[str], int], dtype: mx.Dtype) -> None:
    """Lets INT8 layers, loaded and cast, share what they can; `rows` is from a path to tokens."""
    for path, layer in model.named_modules():
        if isinstance(layer, INT8Linear):
            layer.prepare_for(rows(path), dtype)
    join(model)


def block_for(model: Model, int8: Int8 = OFF) -> QuantizationBlock:
    """What is asked for; of a model whose own file is a converted one, that it is loaded so."""
    block, folder = int8.block(), folder_of(model)
    if block.enabled or folder is None or not is_converted(folder / TRANSFORMER):
        return block
    if int8.quantization is not None:
        raise UserError(
            f"{folder / TRANSFORMER} is INT8, and the block does not say enabled: true; say it, "
            "with checkpoint_is_quantized: true, or leave the block out"
        )
    return CONVERTED


def is_converted(path: Path) -> bool:
    """Whether `convert_to_int8` has written the file."""
    _, metadata = read_header(path)
    return scheme_of(metadata, path) is not None


@dataclass(frozen=True)
class Put:
    """Puts weights and INT8 layers into a transformer."""

    int8: Int8
    block: QuantizationBlock
    backend: str
    tell: Tell

    def from_file(self, model: nn.Module, path: Path) -> None:
        """From the pipeline's own file, or from the one that was named."""
        named = self.int8.int8_checkpoint
        self.into(model, path if named is None else named)

    def into(self, model: nn.Module, path: str | Path | None) -> None:
        """From a file or folder; without one, of the 16-bit weights that the model has."""
        checkpoint = None if path is None else partial(read_weights, Path(path))
        try:
            paths = prepare_int8(model, self.block, checkpoint, backend=self.backend)
        except UserError as error:
            message = self.said(error)
            known = path is None or str(path) in message
            raise UserError(message if known else f"{path}: {message}") from None
        if self.block.checkpoint_is_quantized:
            self.tell(f"{PRE_QUANTIZED} {path}")
        else:
            self.tell(f"quantized {len(paths)} layers to INT8 while loading")

    def said(self, error: UserError) -> str:
        """The message, whose way out names what was given: the block, or else the option."""
        option = self.int8.quantization is None and isinstance(error, OtherKind)
        if option and error.is_int8 == self.int8.use_int8:
            return f"{error.what}; {LEAVE_OUT if error.is_int8 else CONVERT}"
        return str(error)


def folder_of(model: Model) -> Path | None:
    """The folder of a pipeline whose transformer is one file of the transformer's own names."""
    if not isinstance(model, str) or (model in MODELS and model != "nano"):
        return None
    folder = NANO if model == "nano" else Path(model)
    return folder if (folder / TRANSFORMER).is_file() else None


def sixteen_bit_self(model: Model, int8: Int8 = OFF) -> Model | None:
    """What alone opens the 16-bit model of one that is asked for in INT8."""
    block = block_for(model, int8)
    own = block.checkpoint_is_quantized and int8.int8_checkpoint is None
    return model if block.enabled and not own else None


def published(model: Model) -> ModelChoice | None:
    """The model, if it is a Stable Diffusion 3 by name or in a checkpoint."""
    choice = model if isinstance(model, ModelChoice) else ModelChoice(model)
    by_checkpoint = choice.name is None and choice.checkpoint is not None
    return choice if choice.name in SD3 or by_checkpoint else None


def reread_of(model: Model, int8: Int8 = OFF) -> Reread | None:
    """How the transformer's tensors are read again, unread as yet; None where no file has them."""
    if is_saved(model):
        return reread_saved(model)
    block = block_for(model, int8)
    if block.enabled and not block.checkpoint_is_quantized:
        return None  # the codes were made in memory
    if block.enabled and int8.int8_checkpoint is not None:
        return partial(read_weights, Path(int8.int8_checkpoint))
    if (folder := folder_of(model)) is not None:
        return partial(load_tensors, folder / TRANSFORMER)
    if (choice := published(model)) is not None:
        return partial(read_weights, find_files(choice.name, choice.checkpoint).transformer)
    return None


def hash_of(pipeline: Pipeline, int8: Int8, block: QuantizationBlock) -> str:
    """Another one than the 16-bit model's."""
    checkpoint = None if int8.int8_checkpoint is None else Path(int8.int8_checkpoint)
    if checkpoint is not None and checkpoint.is_dir():
        files = sorted(weights_folder(checkpoint).glob("*.safetensors"))
        held = {path.name: hash_file(path) for path in files}
    else:
        held = None if checkpoint is None else hash_file(checkpoint)
    return hash_json(
        {
            "model": pipeline.hash,
            "int8": {"scope": block.scope_attr, "skip": block.skip_keywords, "checkpoint": held},
        }
    )


def refuse_beside_codes(int8: Int8) -> None:
    """Raises where INT8 is asked for of a model that is to run on rounded weights."""
    if int8.block().enabled:
        raise UserError(
            "INT8 takes the place of 16-bit weights, and here are those that the weight track has "
            "rounded; say enabled: false, or draw with `ditq generate`, which runs INT8"
        )


def int8_layers(model: MMDiT) -> list[str]:
    """Paths of the INT8 layers."""
    return [path for path, module in model.named_modules() if isinstance(module, INT8Linear)]
