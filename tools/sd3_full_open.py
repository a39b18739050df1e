"""Opens a model and reads all weights of its transformer, and nothing else.

python -m tools.sd3_full_open --checkpoint FOLDER
python -m tools.sd3_full_open --model SAVED
"""

from __future__ import annotations

import time

from src.inference.saved import open_pipeline
from src.model_options import model_options
from src.models.load import Model
from src.store import human_bytes

import click
import mlx.core as mx
from mlx.utils import tree_flatten


@click.command()
@model_options("sd3-medium", encodes=True)
def main(model: Model) -> None:
    """Open a model."""
    start = time.perf_counter()
    transformer = open_pipeline(model).transformer
    mx.eval(transformer.parameters())
    held = sum(tensor.nbytes for _, tensor in tree_flatten(transformer.parameters()))
    click.echo(f"{human_bytes(held)} in memory, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
