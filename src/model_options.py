"""The options that say which model, the same in every stage that loads one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .inference.saved import is_saved
from .models.load import MODELS, SD3, ModelChoice
from .models.sd3_text import Text

CHECKPOINT_VARIABLE = "DITQ_CHECKPOINT"


def model_options(
    default: str | None = None, help: str | None = None, encodes: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds --model and --checkpoint, and where prompts are read (`encodes`) how; the command gets
    one argument, `model`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def run(
            *arguments: Any,
            model: str | None,
            checkpoint: str | None,
            t5: bool | None = None,
            quantize_text_encoders: str | None = None,
            **options: Any,
        ) -> Any:
            text = Text(t5, quantize_text_encoders and int(quantize_text_encoders))
            source = click.get_current_context().get_parameter_source
            for_all = source("checkpoint") is ParameterSource.ENVIRONMENT
            if checkpoint is not None and source("model") is ParameterSource.DEFAULT:
                model = None  # the checkpoint tells
            elif for_all and not takes_parts(model):
                checkpoint = None  # this model is another
            return command(*arguments, model=choice(model, checkpoint, text, for_all), **options)

        text_options = [T5, QUANTIZE] if encodes else []
        named = click.option(
            "--model", default=default, help=help or f"Name ({', '.join(MODELS)}) or folder."
        )
        for option in reversed([named, CHECKPOINT, *text_options]):
            run = option(run)
        return run

    return decorate


def takes_parts(model: str) -> bool:
    """Whether a checkpoint may have what the model is read from."""
    return model in SD3 or is_saved(model)


def choice(
    model: str | None, checkpoint: str | None, text: Text, for_all: bool = False
) -> str | ModelChoice | None:
    """A name as it is, and more than a name only where more was said."""
    if checkpoint is None and text == Text():
        return model
    return ModelChoice(model, None if checkpoint is None else Path(checkpoint), text, for_all)


CHECKPOINT = click.option(
    "--checkpoint",
    envvar=CHECKPOINT_VARIABLE,
    help="Stable Diffusion 3 on this machine: a .safetensors file or a folder; nothing is "
    f"downloaded.  [default: {CHECKPOINT_VARIABLE}, or the hub's cache]",
)
T5 = click.option(
    "--t5/--no-t5",
    default=None,
    help="Of Stable Diffusion 3: read prompts with T5 too.  [with, or as a folder was saved]",
)
QUANTIZE = click.option(
    "--quantize-text-encoders",
    type=click.Choice(["4", "8"]),
    help="Of Stable Diffusion 3: bits of the text encoders.  [default: 16]",
)
