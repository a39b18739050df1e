"""Scenes, captions and the renderer of the nano model's data."""

from __future__ import annotations

from dataclasses import replace

from src.errors import UserError
from src.models.nano import scenes as nano
from src.models.nano.captions import MAX_WORDS, VOCABULARY, captions, parse, tokenize
from src.models.nano.render import draw, render, scene_arrays
from src.models.nano.sprites import background_table

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def sample(n: int, seed: int = 0, **options) -> nano.SceneBatch:
    return nano.sample_scenes(np.random.default_rng(seed), n, **options)


def pictures_of(scenes: nano.SceneBatch) -> np.ndarray:
    return np.array(render(scenes))


def foreground(scenes: nano.SceneBatch) -> np.ndarray:
    """(n, 128, 128) where a picture differs clearly from its background, shadows aside."""
    plain = background_table()[scenes.background]
    return np.abs(pictures_of(scenes) - plain).max(axis=-1) > 0.25


def held_out(scenes: nano.SceneBatch) -> np.ndarray:
    """(n,) whether a scene shows a held-out pair."""
    pairs = {(nano.SHAPES.index(a), nano.COLOURS.index(b)) for a, b in nano.HELD_OUT_PAIRS}
    shown = [
        [pair in pairs for pair in zip(shapes, colours, strict=True)]
        for shapes, colours in zip(scenes.shape.tolist(), scenes.colour.tolist(), strict=True)
    ]
    return np.any(np.array(shown) & scenes.present(), axis=1)


def test_seen_scenes_never_show_a_held_out_pair_and_unseen_ones_always_do():
    assert not held_out(sample(5000, pairs="seen")).any()
    assert held_out(sample(2000, pairs="unseen")).all()


def test_every_shape_and_colour_is_seen_with_most_partners():
    pairs = nano.pair_table("seen")
    assert min(np.bincount(pairs[:, 0])) >= len(nano.COLOURS) - 1
    assert min(np.bincount(pairs[:, 1])) >= len(nano.SHAPES) - 2


def test_sampling_covers_all_codes_and_obeys_counts():
    scenes = sample(5000)
    assert set(scenes.layout.tolist()) == set(range(nano.LAYOUT_COUNT))
    assert set(scenes.background.tolist()) == set(range(len(nano.BACKGROUNDS)))
    assert set(sample(200, counts=(2,)).count.tolist()) == {2}
    absent = ~scenes.present()
    for name in ("shape", "colour", "size", "texture", "x", "y"):
        assert not getattr(scenes, name)[absent].any()


def test_sampling_repeats_with_the_seed():
    for first, second in zip(sample(50).arrays(), sample(50).arrays(), strict=True):
        np.testing.assert_array_equal(first, second)


def test_jitter_is_bounded_and_objects_never_touch():
    scenes = sample(20000, counts=(2, 3))
    present = scenes.present()
    centre = nano.layout_centres()[scenes.layout]
    assert np.abs(scenes.x - centre[..., 0])[present].max() <= nano.JITTER
    radius = np.array(nano.RADII)[scenes.size]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        both = present[:, b]
        apart = np.hypot(scenes.x[:, a] - scenes.x[:, b], scenes.y[:, a] - scenes.y[:, b])
        assert (apart - radius[:, a] - radius[:, b])[both].min() > 0


@pytest.mark.parametrize("options", [{"pairs": "some"}, {"counts": (0,)}, {"counts": ()}])
def test_sampling_refuses_bad_options(options):
    with pytest.raises(UserError, match="choose"):
        sample(1, **options)


def test_slices_and_concatenation_keep_scenes():
    scenes = sample(6)
    again = nano.concatenate([scenes[:2], scenes[np.array([2, 3, 4, 5])]])
    assert len(scenes[3]) == 1
    assert again.same_words(scenes).all()


def test_pictures_have_shape_range_and_repeat():
    scenes = sample(12)
    first = pictures_of(scenes)
    assert first.shape == (12, 128, 128, 3) and first.dtype == np.float32
    assert first.min() >= 0 and first.max() <= 1
    np.testing.assert_array_equal(first, pictures_of(scenes))


def test_a_picture_does_not_depend_on_its_batch():
    scenes = sample(5)
    np.testing.assert_allclose(pictures_of(scenes)[3], pictures_of(scenes[3])[0], atol=1e-5)


def test_drawing_can_be_compiled():
    scenes = sample(2)
    compiled = mx.compile(draw)(scene_arrays(scenes))
    np.testing.assert_allclose(np.array(compiled), pictures_of(scenes), atol=1e-4)


@pytest.mark.parametrize("name", ["shape", "colour", "size", "texture", "background"])
def test_every_value_of_an_attribute_changes_the_picture(name):
    tables = {"shape": nano.SHAPES, "colour": nano.COLOURS, "size": nano.SIZES}
    tables |= {"texture": nano.TEXTURES, "background": nano.BACKGROUNDS}
    values = np.arange(len(tables[name]), dtype=np.int32)
    base = parse("a small red star in the center on a grey background")[np.zeros_like(values)]
    codes = getattr(base, name).copy()
    codes[(slice(None),) + (0,) * (codes.ndim - 1)] = values
    pictures = pictures_of(replace(base, **{name: codes}))
    difference = np.abs(pictures[:, None] - pictures[None]).max(axis=-1)
    changed = (difference > 0.08).sum(axis=(2, 3))
    assert changed[~np.eye(len(values), dtype=bool)].min() > 30


@pytest.mark.parametrize("size", range(len(nano.SIZES)))
def test_every_colour_is_visible_on_every_background(size):
    colour, background = np.meshgrid(np.arange(len(nano.COLOURS)), np.arange(len(nano.BACKGROUNDS)))
    base = parse("a small red ring in the center on a grey background")
    scenes = base[np.zeros(colour.size, dtype=int)]
    scenes.colour[:, 0], scenes.size[:, 0] = colour.ravel(), size
    scenes = replace(scenes, background=background.ravel().astype(np.int32))
    difference = np.abs(pictures_of(scenes) - background_table()[scenes.background]).max(axis=-1)
    area = np.pi * nano.RADII[size] ** 2 * 0.55
    assert ((difference > 0.15).sum(axis=(1, 2)) > area).all()


def test_edges_are_anti_aliased():
    row = pictures_of(parse("a large red square in the center on a night background"))[0, 64, :, 0]
    edge = row[40:52]
    steps = np.abs(np.diff(edge))
    assert steps.max() < 0.75 * (edge.max() - edge.min())


def test_half_a_pixel_moves_the_picture():
    scenes = parse("a large red circle in the center on a grey background")
    moved = replace(scenes, x=scenes.x + np.float32(0.5))
    both = replace(scenes, x=scenes.x + np.float32(1))
    start, half, whole = (pictures_of(s)[0, 64, 40:48, 0] for s in (scenes, moved, both))
    np.testing.assert_allclose(half, (start + whole) / 2, atol=0.08)
    assert np.abs(start - half).max() > 0.02


def test_single_objects_lie_at_their_place():
    scenes = sample(40, counts=(1,))
    for mask, x, y in zip(foreground(scenes), scenes.x[:, 0], scenes.y[:, 0], strict=True):
        rows, columns = np.nonzero(mask)
        assert abs((columns.min() + columns.max() + 1) / 2 - x) < 7
        assert abs((rows.min() + rows.max() + 1) / 2 - y) < 7


def test_textures_survive_a_blur():
    """A codec smooths: after a 3x3 mean the three textures must still differ on small objects."""
    names = ["a small blue circle", "a small blue striped circle", "a small blue dotted circle"]
    scenes = parse([f"{name} in the center on a sand background" for name in names])
    patch = pictures_of(scenes)[:, 50:78, 50:78].mean(axis=-1)
    near = [np.roll(patch, (i, j), (1, 2)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    smooth = np.mean(near, axis=0)[:, 6:-6, 6:-6]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(smooth[a] - smooth[b]).mean() > 0.04


def test_captions_read_like_this():
    scenes = parse(["a large red striped star in the upper left on a sand background"])
    assert (scenes.count[0], scenes.layout[0]) == (1, 0)
    assert nano.SHAPES[scenes.shape[0, 0]] == "star"
    assert nano.TEXTURES[scenes.texture[0, 0]] == "striped"
    three = parse(
        "a small red ring to the left of a large blue drop, both above a small white cross "
        "on a night background"
    )
    assert three.y[0, 0] == three.y[0, 1] < three.y[0, 2]
    assert three.x[0, 0] < three.x[0, 2] < three.x[0, 1]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_parsing_a_caption_gives_the_scene_back(seed):
    scenes = sample(25, seed, pairs="all")
    texts = captions(scenes)
    parsed = parse(texts)
    assert parsed.same_words(scenes).all()
    assert captions(parsed) == texts
    assert np.abs(parsed.x - scenes.x)[scenes.present()].max() <= nano.JITTER


def test_every_layout_has_its_own_words():
    scenes = sample(3000)
    first = np.unique(scenes.layout, return_index=True)[1]
    assert set(parse(captions(scenes[first])).layout.tolist()) == set(range(nano.LAYOUT_COUNT))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a large redd star at the top on a sand background", "'redd'.*did you mean red"),
        ("a large red elephant at the top on a sand background", "'elephant'.*shapes: circle"),
        ("a red star at the top on a sand background", "expected 'small', 'large' at word 2"),
        ("a large red star at the top", "found 'the end'"),
        ("", "expected 'a' at word 1"),
        ("a large red star at the top on a sand background at the top", "nothing may follow"),
    ],
)
def test_captions_outside_of_the_grammar_are_refused(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_tokens_name_the_words_and_the_empty_caption_is_its_own_word():
    assert len(VOCABULARY) <= 64 and len(set(VOCABULARY)) == len(VOCABULARY)
    text = (
        "a large red star to the left of a small blue ring, both below a large pink drop on a sky"
    )
    tokens = tokenize(["", text])
    assert tokens.shape == (2, MAX_WORDS) and tokens.dtype == np.int32
    assert tokens[0].tolist() == [1] + [0] * (MAX_WORDS - 1)
    words = [VOCABULARY[index] for index in tokens[1] if index]
    assert " ".join(words).replace(" ,", ",") == text


def test_every_sampled_caption_fits_the_token_limit():
    tokens = tokenize(captions(sample(2000, pairs="all")))
    assert (tokens[:, -1] == 0).all() and (tokens[:, 0] > 1).all()


def test_tokenizing_refuses_what_is_too_long_or_unknown():
    with pytest.raises(UserError, match="the limit is 4"):
        tokenize(["a large red striped star"], max_words=4)
    with pytest.raises(UserError, match="unknown word 'lilac'"):
        tokenize(["a lilac star"])
