"""The scorer network and the judge that compares what it sees with a caption."""

from __future__ import annotations

from dataclasses import replace

from src.errors import UserError
from src.models.nano import scenes as nano
from src.models.nano.captions import parse
from src.models.nano.judge import accuracy, compare, judge
from src.models.nano.render import render, scene_arrays
from src.models.nano.scorer import (
    ATTRIBUTES,
    CELL,
    GRID_SIZE,
    MAX_DETECTIONS,
    Detections,
    Scorer,
    decode,
    load_scorer,
    parameter_count,
    save_scorer,
)

import mlx.core as mx
import numpy as np
import pytest

from tools.train_scorer import augment, scorer_loss, smooth


@pytest.fixture(scope="module")
def scenes() -> nano.SceneBatch:
    return nano.sample_scenes(np.random.default_rng(3), 300, pairs="all")


def perfect(scenes: nano.SceneBatch, seed: int = 0) -> Detections:
    """What a faultless scorer sees: the scenes' objects, in a random order of slots."""
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((len(scenes), MAX_DETECTIONS)), axis=1)

    def slots(values: np.ndarray) -> np.ndarray:
        padded = np.concatenate([values, np.zeros((len(values), 1), values.dtype)], axis=1)
        return np.take_along_axis(padded, order, axis=1)

    names = ("shape", "colour", "size", "texture", "x", "y")
    present = slots(scenes.present())
    columns = {name: slots(getattr(scenes, name)) for name in names}
    return Detections(
        present=present,
        score=present.astype(float),
        background=scenes.background,
        **columns,
    )


def perfect_logits(scenes: nano.SceneBatch) -> dict[str, np.ndarray]:
    """The network outputs that say exactly what the scenes show."""
    n = len(scenes)
    logits = {name: np.zeros((n, GRID_SIZE, GRID_SIZE, len(v))) for name, v in ATTRIBUTES.items()}
    logits["heat"] = np.full((n, GRID_SIZE, GRID_SIZE), -6.0)
    logits["offset"] = np.zeros((n, GRID_SIZE, GRID_SIZE, 2))
    logits["background"] = np.eye(len(nano.BACKGROUNDS))[scenes.background]
    for i, slot in zip(*np.nonzero(scenes.present()), strict=True):
        x, y = scenes.x[i, slot] / CELL, scenes.y[i, slot] / CELL
        cell = (i, int(y), int(x))
        logits["heat"][cell] = 5.0
        logits["offset"][cell] = (x - int(x) - 0.5, y - int(y) - 0.5)
        for name in ATTRIBUTES:
            logits[name][cell][getattr(scenes, name)[i, slot]] = 4.0
    return logits


def test_perfect_detections_are_all_right_in_any_order(scenes):
    for seed in range(3):
        assert accuracy(compare(perfect(scenes, seed), scenes)) == dict.fromkeys(
            ["count", "shape", "colour", "size", "texture", "layout", "background", "all"], 1.0
        )


def test_perfect_logits_decode_to_the_scenes(scenes):
    seen = decode(perfect_logits(scenes))
    assert compare(seen, scenes)["all"].all()
    assert np.allclose(
        np.sort(seen.x[seen.present]), np.sort(scenes.x[scenes.present()]), atol=1e-3
    )


@pytest.mark.parametrize("name", list(ATTRIBUTES))
def test_one_wrong_attribute_fails_that_attribute_alone(scenes, name):
    codes = getattr(scenes, name).copy()
    codes[:, 0] = (codes[:, 0] + 1) % len(ATTRIBUTES[name])
    shown = replace(scenes, **{name: codes})
    verdict = compare(perfect(shown), scenes)
    one = scenes.count == 1
    assert not verdict[name].any() and not verdict["all"].any()
    for other in set(ATTRIBUTES) - {name} | {"count", "layout", "background"}:
        assert verdict[other][one].all()


def test_a_missing_or_an_extra_object_fails_the_count(scenes):
    many = scenes[scenes.count > 1]
    fewer = replace(many, count=many.count - 1)
    verdict = compare(perfect(fewer), many)
    assert not verdict["count"].any() and not verdict["layout"].any() and not verdict["shape"].any()
    verdict = compare(perfect(many), fewer)
    assert not verdict["count"].any() and not verdict["all"].any()


def test_a_wrong_background_fails_the_background_alone(scenes):
    shown = replace(scenes, background=(scenes.background + 1) % len(nano.BACKGROUNDS))
    verdict = compare(perfect(shown), scenes)
    assert not verdict["background"].any() and not verdict["all"].any()
    assert verdict["layout"].all() and verdict["shape"].all()


def test_every_other_layout_of_the_same_objects_is_wrong():
    for count in (1, 2, 3):
        layouts = np.array(nano.LAYOUTS_BY_COUNT[count], dtype=np.int32)
        asked, shown = (axis.ravel() for axis in np.meshgrid(layouts, layouts))
        one = nano.sample_scenes(np.random.default_rng(5), 1, counts=(count,))
        one = replace(one, shape=np.array([[0, 1, 2]]) * one.present())
        batch = one[np.zeros(len(asked), dtype=int)]
        centre = nano.layout_centres()[shown] * batch.present()[..., None]
        pictured = replace(batch, layout=shown, x=centre[..., 0], y=centre[..., 1])
        verdict = compare(perfect(pictured), replace(batch, layout=asked))
        np.testing.assert_array_equal(verdict["layout"], asked == shown)
        assert verdict["shape"].all() and verdict["colour"].all()


def test_swapped_colours_are_seen():
    asked = parse("a large red star to the left of a large blue star on a sky background")
    shown = parse("a large blue star to the left of a large red star on a sky background")
    verdict = compare(perfect(shown), asked)
    assert not verdict["all"].any()
    assert not (verdict["layout"] & verdict["colour"]).any()


def test_an_empty_picture_has_no_objects_right(scenes):
    logits = perfect_logits(scenes[:5])
    logits["heat"][:] = -6.0
    verdict = compare(decode(logits), scenes[:5])
    assert verdict["background"].all()
    for name in ("count", "layout", *ATTRIBUTES):
        assert not verdict[name].any()


def test_the_network_gives_maps_features_and_verdicts():
    scorer, batch = Scorer(), nano.sample_scenes(np.random.default_rng(0), 2)
    pictures = render(batch)
    logits = scorer(pictures)
    assert logits["heat"].shape == (2, GRID_SIZE, GRID_SIZE)
    assert logits["shape"].shape == (2, GRID_SIZE, GRID_SIZE, len(nano.SHAPES))
    assert scorer.features(pictures).shape == (2, 192)
    assert scorer.spatial_features(pictures).shape == (2, 192)
    assert parameter_count(scorer) <= 600_000
    verdict = judge(scorer, pictures, batch)
    assert all(right.shape == (2,) and right.dtype == bool for right in verdict.values())


def test_a_saved_scorer_comes_back_in_half_precision(tmp_path):
    scorer, pictures = Scorer(), mx.random.uniform(shape=(1, 128, 128, 3))
    save_scorer(scorer, tmp_path / "scorer.safetensors")
    again = load_scorer(tmp_path / "scorer.safetensors")
    save_scorer(again, tmp_path / "again.safetensors")
    first, second = (tmp_path / f"{name}.safetensors" for name in ("scorer", "again"))
    assert first.read_bytes() == second.read_bytes()
    np.testing.assert_allclose(
        np.array(scorer.features(pictures)), np.array(again.features(pictures)), atol=0.02
    )


def test_unusable_scorer_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no scorer at"):
        load_scorer(tmp_path / "absent.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a file of weights")
    with pytest.raises(UserError, match="no readable safetensors"):
        load_scorer(broken)
    old = tmp_path / "old.safetensors"
    mx.save_safetensors(str(old), {"a": mx.zeros(1)}, metadata={"data_version": "0"})
    with pytest.raises(UserError, match="version 0"):
        load_scorer(old)
    other = tmp_path / "other.safetensors"
    metadata = {"data_version": str(nano.DATA_VERSION)}
    mx.save_safetensors(str(other), {"a": mx.zeros(1)}, metadata=metadata)
    with pytest.raises(UserError, match="does not hold"):
        load_scorer(other)


def test_blur_of_the_augmentation_keeps_brightness_and_edges_in_place():
    pictures = render(nano.sample_scenes(np.random.default_rng(1), 2))
    blurred = smooth(pictures)
    np.testing.assert_allclose(np.array(smooth(mx.ones((1, 8, 8, 3)))), 1, atol=1e-6)
    assert abs(float(blurred.mean() - pictures.mean())) < 1e-3
    flipped = smooth(pictures[:, ::-1, ::-1])[:, ::-1, ::-1]
    np.testing.assert_allclose(np.array(flipped), np.array(blurred), atol=1e-5)


def test_augmented_pictures_stay_pictures():
    pictures = render(nano.sample_scenes(np.random.default_rng(2), 8))
    changed = augment(pictures)
    assert changed.shape == pictures.shape
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1
    assert 0 < float(mx.abs(changed - pictures).mean()) < 0.12


def test_the_loss_is_small_for_perfect_outputs_and_grows_with_each_mistake(scenes):
    few = scenes[:8]
    targets = scene_arrays(few)
    sure = {name: mx.array(np.float32(3 * value)) for name, value in perfect_logits(few).items()}
    sure["offset"] = sure["offset"] / 3
    sure["background"] = 10 * sure["background"]
    pictures = mx.zeros((8, 128, 128, 3))
    best = float(scorer_loss(lambda _: sure, pictures, targets))
    for name in ("heat", "offset", "background"):
        worse = sure | {name: -sure[name] - 1.0}
        assert float(scorer_loss(lambda _, worse=worse: worse, pictures, targets)) > best + 0.3
