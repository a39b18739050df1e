"""Draws scenes: arrays of codes in, pictures out, batched and wholly on the device."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from .scenes import MAX_OBJECTS, PICTURE_SIZE, SIZES, TEXTURES, SceneBatch
from .sprites import (
    EDGE_MARGIN,
    PATCH_SIZE,
    background_table,
    colour_table,
    ink_table,
    sprite_table,
)

SHADOW_STRENGTH = 0.42


@lru_cache(maxsize=1)
def device_tables() -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Sprites, object colours, ink colours and backgrounds as MLX arrays."""
    tables = (sprite_table(), colour_table(), ink_table(), background_table())
    return tuple(mx.array(table) for table in tables)


def scene_arrays(scenes: SceneBatch) -> dict[str, mx.array]:
    """The scenes' arrays by field name, for :func:`draw` and for losses."""
    names = SceneBatch.__dataclass_fields__
    return {name: mx.array(np.ascontiguousarray(getattr(scenes, name))) for name in names}


def placement(position: mx.array) -> mx.array:
    """(n, 3, 128, 72) weights that shift a patch to ``position`` (n, 3) px along one axis.

    Linear interpolation as a matrix: two products move a patch by fractions of a pixel.
    """
    pixel = mx.arange(PICTURE_SIZE, dtype=mx.float32) + 0.5
    sample = mx.arange(PATCH_SIZE, dtype=mx.float32) - (PATCH_SIZE - 1) / 2
    offset = pixel[:, None] - sample[None, :]
    return mx.maximum(0, 1 - mx.abs(offset - position[..., None, None]))


def draw(scenes: dict[str, mx.array]) -> mx.array:
    """(n, 128, 128, 3) float32 pictures in [0, 1] of the arrays from :func:`scene_arrays`.

    A pure function of arrays that can be part of a compiled step. Objects must not overlap.
    """
    sprites, colours, inks, backgrounds = device_tables()
    code = (scenes["shape"] * len(SIZES) + scenes["size"]) * len(TEXTURES) + scenes["texture"]
    down = placement(scenes["y"])[:, :, None]
    right = placement(scenes["x"])[:, :, None].swapaxes(-1, -2)
    edge, light, ink, shadow = mx.moveaxis((down @ sprites[code]) @ right, 2, 0)
    present = mx.arange(MAX_OBJECTS) < scenes["count"][:, None]
    cover = mx.where(present[..., None, None], mx.clip(edge - EDGE_MARGIN + 0.5, 0, 1), 0)
    shade = mx.sum(mx.where(present[..., None, None], shadow, 0), axis=1)[..., None]
    light = mx.sum(cover * light, axis=1)[..., None]
    paint = blend_colours(cover * (1 - ink), colours[scenes["colour"]])
    paint = paint + blend_colours(cover * ink, inks[scenes["colour"]])
    cover = mx.minimum(mx.sum(cover, axis=1), 1)[..., None]
    lit = paint * (1 + mx.minimum(light, 0)) + (cover - paint) * mx.maximum(light, 0)
    ground = backgrounds[scenes["background"]] * (1 - SHADOW_STRENGTH * mx.minimum(shade, 1))
    return mx.clip(ground * (1 - cover) + lit, 0, 1)


def blend_colours(weight: mx.array, colour: mx.array) -> mx.array:
    """(n, 128, 128, 3) the sum over objects of (n, 3, 128, 128) weights times (n, 3, 3) colours."""
    return mx.moveaxis(weight, 1, 3) @ colour[:, None]


def render(scenes: SceneBatch) -> mx.array:
    """(n, 128, 128, 3) float32 pictures in [0, 1] of ``scenes``."""
    return draw(scene_arrays(scenes))
