"""What a nano picture shows: attribute tables, layouts, and the sampler of random scenes.

A scene has one to three objects in spoken order. Positions are pixels of a 128x128 picture, x to
the right and y down, with the centre of the top left pixel at (0.5, 0.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from ...errors import UserError

DATA_VERSION = 1
PICTURE_SIZE = 128
MAX_OBJECTS = 3
JITTER = 4.0

SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "ring",
    "cross",
    "heart",
    "crescent",
    "drop",
    "arrow",
)
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white")
SIZES = ("small", "large")
RADII = (13.0, 21.0)
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = ("grey", "sky", "night", "sand", "meadow", "checkered")

HELD_OUT_PAIRS = (
    ("circle", "purple"),
    ("square", "cyan"),
    ("triangle", "pink"),
    ("star", "blue"),
    ("ring", "orange"),
    ("cross", "green"),
    ("heart", "yellow"),
    ("crescent", "red"),
    ("drop", "white"),
    ("arrow", "purple"),
)

PLACES = (
    "upper left",
    "top",
    "upper right",
    "left",
    "center",
    "right",
    "lower left",
    "bottom",
    "lower right",
)
RELATIONS = ("left", "right", "above", "below")
FIRST_PAIR_LAYOUT = len(PLACES)
FIRST_TRIPLE_LAYOUT = FIRST_PAIR_LAYOUT + len(RELATIONS)
LAYOUT_COUNT = FIRST_TRIPLE_LAYOUT + 2 * len(RELATIONS)
LAYOUTS_BY_COUNT = (
    range(0),
    range(FIRST_PAIR_LAYOUT),
    range(FIRST_PAIR_LAYOUT, FIRST_TRIPLE_LAYOUT),
    range(FIRST_TRIPLE_LAYOUT, LAYOUT_COUNT),
)


@dataclass(frozen=True)
class SceneBatch:
    """Scenes as arrays: codes index the tables above; entries of absent objects are 0."""

    count: np.ndarray  # (n,) objects in the scene, 1 to 3
    layout: np.ndarray  # (n,) code: a place, a relation of two, or a relation of a pair and a third
    background: np.ndarray  # (n,)
    shape: np.ndarray  # (n, 3)
    colour: np.ndarray  # (n, 3)
    size: np.ndarray  # (n, 3)
    texture: np.ndarray  # (n, 3)
    x: np.ndarray  # (n, 3) centre in pixels
    y: np.ndarray  # (n, 3) centre in pixels

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, index: slice | np.ndarray | Sequence[int]) -> SceneBatch:
        """The scenes at a slice or an array of indices."""
        if isinstance(index, (int, np.integer)):
            index = [int(index)]
        return SceneBatch(*(array[index] for array in self.arrays()))

    def arrays(self) -> list[np.ndarray]:
        """The nine arrays, in field order."""
        return [getattr(self, field.name) for field in fields(self)]

    def present(self) -> np.ndarray:
        """(n, 3) which objects are there."""
        return np.arange(MAX_OBJECTS) < self.count[:, None]

    def same_words(self, other: SceneBatch) -> np.ndarray:
        """(n,) whether all that a caption says is equal; jitter is not compared."""
        equal = np.ones(len(self), dtype=bool)
        for name in ("count", "layout", "background", "shape", "colour", "size", "texture"):
            mine, theirs = getattr(self, name), getattr(other, name)
            equal &= np.all((mine == theirs).reshape(len(self), -1), axis=1)
        return equal


def concatenate(batches: Sequence[SceneBatch]) -> SceneBatch:
    """Several batches as one, in order."""
    columns = zip(*(batch.arrays() for batch in batches), strict=True)
    return SceneBatch(*(np.concatenate(column) for column in columns))


def triple_layout(relation: int, side: int) -> int:
    """The layout code of "A relation B, both side C".

    ``side`` is 0 when the pair is above C (pair in a row) or left of C (pair in a column), else 1.
    """
    return FIRST_TRIPLE_LAYOUT + 2 * relation + side


def triple_relations(layout: int) -> tuple[int, int]:
    """The two relation codes of a three-object layout: A to B, and both to C."""
    relation, side = divmod(layout - FIRST_TRIPLE_LAYOUT, 2)
    perpendicular = ("above", "below") if relation < 2 else ("left", "right")
    return relation, RELATIONS.index(perpendicular[side])


def layout_centres() -> np.ndarray:
    """(21, 3, 2) the canonical centre (x, y) of every object in every layout, in pixels."""
    middle, low, high = PICTURE_SIZE / 2, 34.0, 94.0
    near, far = 36.0, 92.0
    centres = np.zeros((LAYOUT_COUNT, MAX_OBJECTS, 2), dtype=np.float32)
    for place in range(len(PLACES)):
        centres[place, 0] = (32.0 * (1 + place % 3), 32.0 * (1 + place // 3))
    for relation in range(len(RELATIONS)):
        axis, reverse = divmod(relation, 2)
        pair = (high, low) if reverse else (low, high)
        layout = FIRST_PAIR_LAYOUT + relation
        centres[layout, :2] = middle
        centres[layout, :2, axis] = pair
        for side in range(2):
            layout = triple_layout(relation, side)
            centres[layout, :2, axis] = pair
            centres[layout, :2, 1 - axis] = far if side else near
            centres[layout, 2, axis] = middle
            centres[layout, 2, 1 - axis] = near if side else far
    return centres


def pair_table(pairs: str) -> np.ndarray:
    """(p, 2) shape and colour codes of the pairs that are "seen", "unseen" or "all"."""
    held_out = {(SHAPES.index(shape), COLOURS.index(colour)) for shape, colour in HELD_OUT_PAIRS}
    every = [(shape, colour) for shape in range(len(SHAPES)) for colour in range(len(COLOURS))]
    if pairs == "seen":
        every = [pair for pair in every if pair not in held_out]
    elif pairs == "unseen":
        every = sorted(held_out)
    elif pairs != "all":
        raise UserError(f"unknown pairs {pairs!r}: choose 'seen', 'unseen' or 'all'")
    return np.array(every, dtype=np.int32)


def sample_scenes(
    rng: np.random.Generator,
    n: int,
    counts: Sequence[int] = (1, 2, 3),
    pairs: str = "seen",
    jitter: float = JITTER,
) -> SceneBatch:
    """``n`` random scenes with a number of objects from ``counts``, moved by up to ``jitter`` px.

    ``pairs`` tells which shape-colour pairs occur: "seen" leaves out the held-out ones, "all" takes
    every pair, and with "unseen" at least one object of each scene is a held-out pair.
    """
    if not counts or not set(counts) <= set(range(1, MAX_OBJECTS + 1)):
        raise UserError(f"counts {tuple(counts)!r}: choose from 1, 2 and 3")
    count = rng.choice(np.array(counts, dtype=np.int32), n)
    starts = np.array([layouts.start for layouts in LAYOUTS_BY_COUNT])
    lengths = np.array([len(layouts) for layouts in LAYOUTS_BY_COUNT])
    layout = (starts[count] + rng.integers(0, lengths[count])).astype(np.int32)
    pair = sample_pairs(rng, count, pairs)
    shift = rng.uniform(-jitter, jitter, (n, MAX_OBJECTS, 2))
    present = np.arange(MAX_OBJECTS) < count[:, None]
    centre = np.where(present[..., None], layout_centres()[layout] + shift, 0).astype(np.float32)
    texture = rng.integers(0, len(TEXTURES), (n, MAX_OBJECTS), dtype=np.int32)
    size = rng.integers(0, len(SIZES), (n, MAX_OBJECTS), dtype=np.int32)
    return SceneBatch(
        count=count,
        layout=layout,
        background=rng.integers(0, len(BACKGROUNDS), n, dtype=np.int32),
        shape=np.where(present, pair[..., 0], 0),
        colour=np.where(present, pair[..., 1], 0),
        size=np.where(present, size, 0),
        texture=np.where(present, texture, 0),
        x=centre[..., 0],
        y=centre[..., 1],
    )


def sample_pairs(rng: np.random.Generator, count: np.ndarray, pairs: str) -> np.ndarray:
    """(n, 3, 2) shape and colour codes under the rule ``pairs`` of :func:`sample_scenes`."""
    table = pair_table("seen" if pairs == "seen" else "all")
    held_out = pair_table(pairs)
    n = len(count)
    sampled = table[rng.integers(0, len(table), (n, MAX_OBJECTS))]
    if pairs == "unseen":
        forced = held_out[rng.integers(0, len(held_out), n)]
        sampled[np.arange(n), rng.integers(0, count)] = forced
    return sampled
