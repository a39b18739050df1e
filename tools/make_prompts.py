"""Writes nano's two prompt lists: `python -m tools.make_prompts`.

Calibration captions are of the kind that training saw; evaluation captions are held out from it.
Both go through pictures of one, two and three objects in turn, so any first few lines are mixed.
"""

from __future__ import annotations

from itertools import chain

from src.cli import command
from src.models.nano.captions import captions, tokenize
from src.models.nano.scenes import sample_scenes
from src.models.prompts import FOLDER
from src.store import write_bytes

import click
import numpy as np

from tools.nano_common import is_held_out


def draw_captions(rng: np.random.Generator, objects: int, n: int, held_out: bool) -> list[str]:
    """`n` different captions of so many objects, all held out from training or all not."""
    texts = captions(sample_scenes(rng, 32 * n, counts=(objects,)))
    kept = is_held_out(tokenize(texts)) == held_out
    distinct = dict.fromkeys(text for text, keep in zip(texts, kept, strict=True) if keep)
    return list(distinct)[:n]


@command()
@click.option("--per-kind", default=192, help="Captions of each number of objects, in each list.")
@click.option("--seed", default=20, help="Of the captions.")
def main(per_kind: int, seed: int) -> None:
    """Write nano.txt and nano_evaluation.txt.

    \b
    Example:
      python -m tools.make_prompts
    """
    for index, (name, held_out) in enumerate((("nano", False), ("nano_evaluation", True))):
        rng = np.random.default_rng([seed, index])
        kinds = [draw_captions(rng, objects, per_kind, held_out) for objects in (1, 2, 3)]
        lines = chain.from_iterable(zip(*kinds, strict=True))
        write_bytes(FOLDER / f"{name}.txt", "".join(f"{line}\n" for line in lines).encode())
        click.echo(f"wrote {FOLDER / name}.txt")


if __name__ == "__main__":
    main()
