"""Which layers of a checkpoint are converted, told by their names and shapes; why others are not.

The names are those of the world's checkpoints: diffusers, Stability's and Black Forest Labs' single
files, Wan's, Kandinsky's, DiffusionKit's. A rule reads whole words of a dotted path, so a model
that nobody has heard of is served where it calls an attention an attention.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import UserError
from ..models.checkpoints import OTHER_PARTS
from ..store import TensorInfo
from .format import WEIGHT, Scheme

MIN_FEATURES = 1024
FLOATS = ("bfloat16", "float16", "float32")

Rule = tuple[str, re.Pattern[str]]

# The first rule that is found in a path gives the reason for keeping it. Words without a digit from
# the path's start on mean outside of every numbered block.
KEPT: tuple[Rule, ...] = (
    ("modulation", re.compile(r"modulation|adaln|scale_shift|(^|[._])mod(\d|[._]|$)")),
    ("norm", re.compile(r"norm|(^|[._])ln(_|\d|[._]|$)")),
    (
        "time, position or input embedding",
        re.compile(r"embed|(^|[._])emb([._]|$)|relative_attention_bias|(^|[._])(time|pos|patch)_"),
    ),
    ("input projection", re.compile(r"^([a-z_]+\.)*(img|txt|vector|guidance)_in(\.|$)")),
    (
        "output projection",
        re.compile(r"^([a-z_]+\.)*(proj_out|out_proj|out_layer|final_layer|head)(\.|$)"),
    ),
)
CONVERTED: tuple[Rule, ...] = (
    ("cross-attention", re.compile(r"(^|[._])cross_?att")),
    ("attention", re.compile(r"(^|[._])(self_?)?att(n|ention)s?\d*(?=[._]|$)")),
    ("feed-forward", re.compile(r"(^|[._])(ff|ffn|mlp)\d*(?=[._]|$)|feed_?forward")),
    # Both in one product: the parallel blocks of FLUX.
    (
        "attention and feed-forward",
        re.compile(r"(^|\.)single_(transformer_)?blocks\.\d+\.(proj_out|linear[12])$"),
    ),
)


@dataclass(frozen=True)
class Selection:
    """What the user says of the layers to convert."""

    scheme: Scheme = Scheme()
    scope_attr: str | None = None
    skip_keywords: tuple[str, ...] = ()
    min_features: int = MIN_FEATURES

    def check(self) -> None:
        self.scheme.check()
        if self.min_features < 0:
            raise UserError(f"min_features must be 0 or more, got {self.min_features}")
        if any(not word for word in self.skip_keywords):
            raise UserError("an empty word among skip_keywords would keep every layer; remove it")


def role(path: str) -> str | None:
    """What a linear path is: attention, cross-attention, feed-forward; None of any other layer."""
    return _first(CONVERTED, path.lower())


def reason_to_keep(path: str, info: TensorInfo, selection: Selection) -> str | None:
    """Why the layer `path` (without ".weight") stays as it is; None if it is converted."""
    if f"{path}.".startswith(OTHER_PARTS):
        return "another part of the pipeline"
    if not in_scope(path, selection.scope_attr):
        return f"outside of {selection.scope_attr}"
    skipped = next((word for word in selection.skip_keywords if word in path), None)
    if skipped is not None:
        return f"skip keyword {skipped}"
    return _kind_to_keep(path, info) or _size_to_keep(info, selection)


def in_scope(path: str, scope: str | None) -> bool:
    """Whether the words of `scope` stand in the path, one after the other."""
    return not scope or f".{scope}." in f".{path}."


def layer_path(name: str) -> str | None:
    """The path of the layer whose weight the tensor is; None for any other tensor."""
    return name.removesuffix(WEIGHT) if name.endswith(WEIGHT) else None


def _kind_to_keep(path: str, info: TensorInfo) -> str | None:
    kept = _first(KEPT, path.lower())
    if kept is not None:
        return kept
    if len(info.shape) != 2:
        return f"{len(info.shape)} dimensions, not 2"
    if role(path) is None:
        return "neither attention nor feed-forward"
    if info.dtype not in FLOATS:
        return f"{info.dtype}, not {', '.join(FLOATS)}"
    return None


def _size_to_keep(info: TensorInfo, selection: Selection) -> str | None:
    rows, columns = info.shape
    if not rows * columns:
        return "empty"
    if min(rows, columns) < selection.min_features:
        return f"under {selection.min_features} features"
    if not selection.scheme.fits(columns):
        return f"{columns} in-features, not divisible by {selection.scheme.block_size}"
    return None


def _first(rules: tuple[Rule, ...], path: str) -> str | None:
    return next((name for name, pattern in rules if pattern.search(path)), None)
