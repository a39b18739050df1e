"""Does a picture show its caption? Matches what the scorer sees to what the caption says."""

from __future__ import annotations

from itertools import permutations

import mlx.core as mx
import numpy as np

from .scenes import (
    FIRST_PAIR_LAYOUT,
    FIRST_TRIPLE_LAYOUT,
    MAX_OBJECTS,
    PLACES,
    SceneBatch,
    layout_centres,
    triple_relations,
)
from .scorer import ATTRIBUTES, MAX_DETECTIONS, Detections, Scorer

RELATION_MARGIN = 8.0
MISSING_COST = 8.0
PIXELS_PER_COST = 1000.0


def judge(scorer: Scorer, pictures: mx.array, scenes: SceneBatch) -> dict[str, np.ndarray]:
    """(n,) booleans per picture: "count", each attribute, "layout", "background" and "all".

    An attribute is right when every object of the caption has it; "layout" is the place of a
    single object and the relations of two or three. ``scenes`` usually are ``parse(captions)``.
    """
    return compare(scorer.detect(pictures), scenes)


def compare(seen: Detections, scenes: SceneBatch) -> dict[str, np.ndarray]:
    """The verdict of :func:`judge` on objects already detected."""
    slot = assign(seen, scenes)
    absent = ~scenes.present()
    found = np.take_along_axis(seen.present, slot, axis=1)
    verdict = {"count": seen.present.sum(axis=1) == scenes.count}
    for name in ATTRIBUTES:
        same = np.take_along_axis(getattr(seen, name), slot, axis=1) == getattr(scenes, name)
        verdict[name] = np.all(absent | (found & same), axis=1)
    x, y = (np.take_along_axis(axis, slot, axis=1) for axis in (seen.x, seen.y))
    verdict["layout"] = np.all(absent | found, axis=1) & layout_holds(x, y, scenes.layout)
    verdict["background"] = seen.background == scenes.background
    verdict["all"] = np.all(list(verdict.values()), axis=0)
    return verdict


def accuracy(verdict: dict[str, np.ndarray]) -> dict[str, float]:
    """The share of pictures that are right, per key of the verdict."""
    return {name: float(np.mean(right)) for name, right in verdict.items()}


def assign(seen: Detections, scenes: SceneBatch) -> np.ndarray:
    """(n, 3) which detection belongs to which object of the caption, at the least total cost.

    The cost of a match counts the wrong attributes; the distance to the layout's canonical centre
    only breaks ties.
    """
    cost = np.zeros((len(scenes), MAX_OBJECTS, MAX_DETECTIONS))
    for name in ATTRIBUTES:
        cost += getattr(scenes, name)[:, :, None] != getattr(seen, name)[:, None, :]
    expected = layout_centres()[scenes.layout]
    across = seen.x[:, None, :] - expected[:, :, None, 0]
    down = seen.y[:, None, :] - expected[:, :, None, 1]
    cost += np.hypot(across, down) / PIXELS_PER_COST
    cost = np.where(seen.present[:, None, :], cost, MISSING_COST)
    cost = np.where(scenes.present()[:, :, None], cost, 0)
    orders = np.array(list(permutations(range(MAX_DETECTIONS), MAX_OBJECTS)))
    totals = sum(cost[:, k, orders[:, k]] for k in range(MAX_OBJECTS))
    return orders[np.argmin(totals, axis=1)]


def relation_holds(
    relation: np.ndarray, across: np.ndarray, down: np.ndarray, dominant: bool
) -> np.ndarray:
    """Whether a first object is left of, right of, above or below a second one.

    ``across`` and ``down`` are the first's position less the second's, in pixels. With
    ``dominant`` the displacement in the relation's direction must also be the larger one.
    """
    horizontal = relation < 2
    along = np.where(horizontal, across, down) * np.where(relation % 2 == 0, -1, 1)
    aside = np.abs(np.where(horizontal, down, across))
    return (along > RELATION_MARGIN) & ((along > aside) | (not dominant))


def layout_holds(x: np.ndarray, y: np.ndarray, layout: np.ndarray) -> np.ndarray:
    """(n,) whether objects at x, y (n, 3) px lie as the layout codes (n,) say."""
    places = layout_centres()[: len(PLACES), 0]
    nearest = np.hypot(x[:, :1] - places[:, 0], y[:, :1] - places[:, 1]).argmin(axis=1)
    pair = relation_holds(layout - FIRST_PAIR_LAYOUT, x[:, 0] - x[:, 1], y[:, 0] - y[:, 1], True)
    triple = np.zeros(len(layout), dtype=bool)
    for index in np.flatnonzero(layout >= FIRST_TRIPLE_LAYOUT):
        triple[index] = triple_holds(x[index], y[index], int(layout[index]))
    return np.select(
        [layout < FIRST_PAIR_LAYOUT, layout < FIRST_TRIPLE_LAYOUT],
        [nearest == layout, pair],
        triple,
    )


def triple_holds(x: np.ndarray, y: np.ndarray, layout: int) -> bool:
    """Whether three objects at x, y (3,) px stand in both relations of a three-object layout."""
    first, second = (np.array(code) for code in triple_relations(layout))
    pair = relation_holds(first, x[0] - x[1], y[0] - y[1], True)
    both = relation_holds(second, x[:2] - x[2], y[:2] - y[2], False)
    return bool(pair & both.all())
