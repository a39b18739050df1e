"""Captions of scenes: a small grammar with an exact inverse, and the text encoder's vocabulary.

    a large red striped star in the upper left on a sand background
    a small blue ring above a large white drop on a night background
    A to the left of B, both above C on a grey background

The texture "plain" is not spoken. The first object's relation to the second is spoken in all four
directions, so no word order is tied to a place.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np

from ...errors import UserError
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    FIRST_PAIR_LAYOUT,
    MAX_OBJECTS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    SceneBatch,
    layout_centres,
    triple_layout,
    triple_relations,
)

MAX_WORDS = 32
PADDING_ID = 0
NULL_ID = 1

PLACE_PHRASES = (
    "in the upper left",
    "at the top",
    "in the upper right",
    "on the left",
    "in the center",
    "on the right",
    "in the lower left",
    "at the bottom",
    "in the lower right",
)
RELATION_PHRASES = ("to the left of", "to the right of", "above", "below")
GRAMMAR_WORDS = ("a", "in", "at", "on", "the", "to", "of", "both", ",", "background")
PLACE_WORDS = ("left", "right", "above", "below", "upper", "lower", "top", "bottom", "center")
VOCABULARY = (
    ("<padding>", "<null>")
    + GRAMMAR_WORDS
    + PLACE_WORDS
    + SIZES
    + COLOURS
    + TEXTURES[1:]
    + SHAPES
    + BACKGROUNDS
)
EXAMPLE = "a large red striped star in the upper left on a sand background"


def captions(scenes: SceneBatch) -> list[str]:
    """One caption per scene; :func:`parse` is its inverse."""
    return [caption(scenes, index) for index in range(len(scenes))]


def caption(scenes: SceneBatch, index: int) -> str:
    """The caption of one scene of the batch."""
    count, layout = int(scenes.count[index]), int(scenes.layout[index])
    names = [object_phrase(scenes, index, slot) for slot in range(count)]
    if count == 1:
        text = f"{names[0]} {PLACE_PHRASES[layout]}"
    elif count == 2:
        text = f"{names[0]} {RELATION_PHRASES[layout - FIRST_PAIR_LAYOUT]} {names[1]}"
    else:
        first, second = (RELATION_PHRASES[code] for code in triple_relations(layout))
        text = f"{names[0]} {first} {names[1]}, both {second} {names[2]}"
    return f"{text} on a {BACKGROUNDS[scenes.background[index]]} background"


def object_phrase(scenes: SceneBatch, index: int, slot: int) -> str:
    """Words like "a large red striped star" for one object."""
    words = ["a", SIZES[scenes.size[index, slot]], COLOURS[scenes.colour[index, slot]]]
    if scenes.texture[index, slot]:
        words.append(TEXTURES[scenes.texture[index, slot]])
    return " ".join([*words, SHAPES[scenes.shape[index, slot]]])


def split_words(text: str) -> list[str]:
    """Lower-case words of a caption; a comma is a word, a full stop at the end is dropped.

    Raises UserError that names a word outside of the vocabulary and the closest ones in it.
    """
    words = text.lower().strip().removesuffix(".").replace(",", " , ").split()
    known = VOCABULARY[NULL_ID + 1 :]
    for word in words:
        if word not in known:
            close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
            hint = f"did you mean {', '.join(close)}?" if close else valid_words()
            raise UserError(f"unknown word {word!r} in caption {text!r}: {hint}")
    return words


def valid_words() -> str:
    """The words that describe a picture, by kind, in one line."""
    kinds = {"shapes": SHAPES, "colours": COLOURS, "sizes": SIZES, "textures": TEXTURES[1:]}
    kinds["backgrounds"] = BACKGROUNDS
    return "; ".join(f"{kind}: {', '.join(words)}" for kind, words in kinds.items())


def tokenize(texts: Sequence[str], max_words: int = MAX_WORDS) -> np.ndarray:
    """(n, max_words) int32 word ids, padded with 0; the empty caption is id 1 and then padding."""
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    tokens = np.full((len(texts), max_words), PADDING_ID, dtype=np.int32)
    for row, text in enumerate(texts):
        words = [ids[word] for word in split_words(text)] or [NULL_ID]
        if len(words) > max_words:
            raise UserError(f"caption {text!r} has {len(words)} words: the limit is {max_words}")
        tokens[row, : len(words)] = words
    return tokens


class Reader:
    """The words of one caption, taken from the front."""

    def __init__(self, text: str):
        self.text = text
        self.words = split_words(text)
        self.position = 0

    def optional(self, choices: Sequence[str]) -> int | None:
        """The index of the phrase in ``choices`` that comes next, which is taken, or None."""
        for index, phrase in enumerate(choices):
            words = phrase.split()
            if self.words[self.position : self.position + len(words)] == words:
                self.position += len(words)
                return index
        return None

    def one_of(self, choices: Sequence[str]) -> int:
        """Like :meth:`optional`, but raises UserError where no phrase fits."""
        found = self.optional(choices)
        if found is None:
            wanted = ", ".join(repr(choice) for choice in choices)
            seen = " ".join(self.words[self.position : self.position + 3]) or "the end"
            raise UserError(
                f"caption {self.text!r}: expected {wanted} at word {self.position + 1}, found "
                f"{seen!r}; a caption reads like {EXAMPLE!r}"
            )
        return found

    def object_codes(self) -> tuple[int, int, int, int]:
        """The (shape, colour, size, texture) codes of an object phrase."""
        self.one_of(("a",))
        size = self.one_of(SIZES)
        colour = self.one_of(COLOURS)
        texture = self.optional(TEXTURES[1:])
        return self.one_of(SHAPES), colour, size, 0 if texture is None else texture + 1


def parse_one(text: str) -> tuple[list[tuple[int, int, int, int]], int, int]:
    """The object codes, the layout and the background of one caption."""
    reader = Reader(text)
    objects = [reader.object_codes()]
    layout = reader.one_of(PLACE_PHRASES + RELATION_PHRASES)
    if layout >= len(PLACES):
        relation = layout - len(PLACES)
        objects.append(reader.object_codes())
        layout = FIRST_PAIR_LAYOUT + relation
        if reader.optional((", both",)) is not None:
            perpendicular = RELATION_PHRASES[2:] if relation < 2 else RELATION_PHRASES[:2]
            layout = triple_layout(relation, reader.one_of(perpendicular))
            objects.append(reader.object_codes())
    reader.one_of(("on a",))
    background = reader.one_of(BACKGROUNDS)
    reader.one_of(("background",))
    if reader.position < len(reader.words):
        rest = " ".join(reader.words[reader.position :])
        raise UserError(f"caption {text!r}: nothing may follow 'background', found {rest!r}")
    return objects, layout, background


def parse(texts: str | Sequence[str]) -> SceneBatch:
    """The scenes that captions describe, each object at its layout's canonical place.

    Raises UserError for a caption outside of the grammar.
    """
    specs = [parse_one(text) for text in ([texts] if isinstance(texts, str) else texts)]
    codes = np.zeros((len(specs), MAX_OBJECTS, 4), dtype=np.int32)
    for row, (objects, _, _) in enumerate(specs):
        codes[row, : len(objects)] = objects
    count = np.array([len(objects) for objects, _, _ in specs], dtype=np.int32)
    layout = np.array([layout for _, layout, _ in specs], dtype=np.int32)
    centre = layout_centres()[layout]
    return SceneBatch(
        count=count,
        layout=layout,
        background=np.array([background for _, _, background in specs], dtype=np.int32),
        shape=codes[..., 0],
        colour=codes[..., 1],
        size=codes[..., 2],
        texture=codes[..., 3],
        x=centre[..., 0],
        y=centre[..., 1],
    )
