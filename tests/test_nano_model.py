"""The trained nano as it ships: small enough, sharp, and it draws what a caption says."""

from __future__ import annotations

from src.models.load import NANO, load_pipeline
from src.models.nano.captions import parse
from src.models.nano.judge import accuracy, judge
from src.models.nano.render import render
from src.models.nano.scenes import HELD_OUT_PAIRS, sample_scenes
from src.models.nano.scorer import load_scorer
from src.models.prompts import load_prompts

import mlx.core as mx
import numpy as np
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nano():
    return load_pipeline("nano")


@pytest.fixture(scope="module")
def scorer():
    return load_scorer(NANO / "scorer.safetensors")


def test_all_of_nano_fits_in_26_megabytes_of_float16():
    files = list(NANO.glob("*.safetensors"))
    assert {p.stem for p in files} == {"transformer", "text_encoder", "codec", "scorer"}
    assert sum(p.stat().st_size for p in files) <= 26_000_000
    assert {t.dtype for p in files for t in mx.load(str(p)).values()} == {mx.float16}


@pytest.mark.parametrize("pairs", ["seen", "unseen"])
def test_codec_is_sharp_and_scorer_reads_rendered_scenes(nano, scorer, pairs):
    scenes = sample_scenes(np.random.default_rng(77), 96, pairs=pairs)
    pictures = render(scenes)
    coded = mx.clip(nano.codec.decode(nano.codec.encode(pictures)), 0, 1)
    error = mx.square(coded - pictures).mean(axis=(1, 2, 3))
    assert float((-10 * mx.log10(error)).mean()) >= 36
    for shown in (pictures, coded):
        assert accuracy(judge(scorer, shown, scenes))["all"] >= 0.99


def test_latents_have_unit_scale(nano):
    """What the flow was trained on: mean 0 and deviation 1 in every channel."""
    latent = nano.codec.encode(render(sample_scenes(np.random.default_rng(78), 96)))
    assert float(mx.abs(latent.mean(axis=(0, 1, 2))).max()) < 0.25
    assert float(mx.abs(mx.log(mx.std(latent, axis=(0, 1, 2)))).max()) < 0.25


def test_held_out_captions_are_drawn_as_they_say(nano, scorer):
    """24 captions that no training saw, of one, two and three objects, all attributes right."""
    prompts = load_prompts("nano_evaluation")[:24]
    pictures = nano.decode(nano.sample(prompts, range(24)))
    verdict = judge(scorer, mx.array(pictures) / 255, parse(prompts))
    assert accuracy(verdict)["all"] >= 0.75
    assert accuracy(verdict)["layout"] >= 0.9


def test_an_unseen_pair_is_drawn(nano, scorer):
    """Shape and colour that training never showed together."""
    shape, colour = HELD_OUT_PAIRS[0]
    prompts = [f"a large {colour} {shape} {p} on a sand background" for p in PLACES]
    pictures = nano.decode(nano.sample(prompts, range(len(prompts))))
    verdict = accuracy(judge(scorer, mx.array(pictures) / 255, parse(prompts)))
    assert verdict["shape"] >= 0.75 and verdict["colour"] >= 0.75


PLACES = ("in the upper left", "at the top", "in the center", "on the right")
