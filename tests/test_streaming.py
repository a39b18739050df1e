"""Block streaming: the same bytes with few blocks in memory."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace

from src.errors import UserError
from src.generate import generate
from src.inference.export import save_model
from src.inference.int8 import Int8, open_with_int8, reread_of
from src.inference.low_memory import low_memory
from src.inference.streaming import bytes_of, moving_blocks, streamed
from src.models.configs import config_named
from src.models.load import load_pipeline
from src.models.paths import BLOCKS
from src.models.pipeline import Conditioning
from src.sampling import Noise, denoise
from src.store import save_tensors

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from .helpers import assert_one_error_line, random_model, run_here
from .quantized_models import quantized_pipeline

PROMPTS = [
    "a large red star in the center on a night background",
    "a small blue ring at the top on a night background",
]
DEPTH = 6


def deep_pipeline():
    """A tiny pipeline with more blocks, each of 0.4 MB."""
    pipeline = load_pipeline("tiny")
    return replace(pipeline, transformer=random_model(replace(config_named("tiny"), depth=DEPTH)))


def pictures(pipeline) -> list[np.ndarray]:
    return [
        np.array(pipeline.sample([prompt], [seed], num_steps=2))
        for seed, prompt in enumerate(PROMPTS)
    ]


def assert_same(some: list[np.ndarray], others: list[np.ndarray]) -> None:
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(one, other)


@given(depth=st.integers(1, 60), keep=st.integers(1, 70))
def test_all_but_the_blocks_that_stay_move(depth, keep):
    moving = moving_blocks(depth, keep)
    assert len(moving) == (0 if keep >= depth else depth - keep + 1)
    assert moving == sorted(set(moving)) and all(0 <= index < depth for index in moving)
    staying = [index for index in range(depth) if index not in moving]
    gaps = [b - a for a, b in zip(staying, staying[1:], strict=False)]
    assert not moving or not gaps or max(gaps) - min(gaps) <= 1  # evenly spread


@pytest.mark.slow
@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("keep", [1, 2, 5, 8, 20])
def test_pictures_are_the_same_bit_for_bit(tmp_path, from_file, int8, keep):
    asked = Int8(use_int8=int8)
    pipeline = open_with_int8("nano", int8=asked, tell=lambda line: None)
    wanted, reread = pictures(pipeline), None
    if from_file:
        save_tensors(
            tmp_path / "a.safetensors", dict(tree_flatten(pipeline.transformer.parameters()))
        )
        reread = lambda: mx.load(str(tmp_path / "a.safetensors"))  # noqa: E731
    with streamed(pipeline, keep, reread):
        assert_same(pictures(pipeline), wanted)
    assert_same(pictures(pipeline), wanted)


def test_the_models_own_file_is_read_again():
    """In 16 bits and cast, as it was loaded."""
    pipeline = load_pipeline("nano")
    wanted = pictures(pipeline)
    with streamed(pipeline, 3, reread_of("nano")):
        assert_same(pictures(pipeline), wanted)


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_no_more_blocks_are_in_memory_than_were_asked_for(keep):
    """Beside them one that is read, and what a step needs for a while."""
    pipeline = deep_pipeline()
    block = bytes_of(pipeline.transformer[BLOCKS][0])

    def peak() -> int:
        mx.reset_peak_memory()
        pipeline.sample(PROMPTS[:1], [0], num_steps=2)
        return mx.get_peak_memory()

    pipeline.sample(PROMPTS[:1], [0], num_steps=2)
    before = peak()
    with streamed(pipeline, keep):
        after = peak()
    gone = (before - after) / block
    assert gone > DEPTH - (keep + 2) * 1.1
    assert mx.get_active_memory() < before - (DEPTH - keep) * block  # what moves stays unread


def test_the_model_is_whole_after_an_interrupt():
    pipeline = load_pipeline("tiny")
    wanted = pictures(pipeline)

    class Stop:
        def step(self, step) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), streamed(pipeline, 1):
        pipeline.sample(PROMPTS[:1], [0], num_steps=3, callbacks=[Stop()])
    assert pipeline.transformer.can_be_compiled
    # The temporary file is gone by now, and what was let go is read all the same.
    assert_same(pictures(pipeline), wanted)


@pytest.mark.skipif(not shutil.which("g++"), reason="MLX compiles with g++ on a CPU")
@pytest.mark.parametrize("int8", [False, True])
def test_compiled_blocks_take_the_weights_that_are_there(int8):
    """Were weights compiled in, other ones in their place would change nothing."""
    pipeline = open_with_int8("tiny", int8=Int8(use_int8=int8), tell=lambda line: None)
    sigmas, latents = pipeline.sigmas(3), []
    conditioning: Conditioning = pipeline.condition(PROMPTS[:1], 4.0)
    for compiled in (False, True):
        with streamed(pipeline, 1, compiled=compiled):
            velocity = pipeline.velocity(conditioning, 4.0, compiled=compiled)
            latents.append(np.array(denoise(velocity, Noise([0]), sigmas, (8, 8, 16))))
    exact = conditioning.text.dtype == mx.float32
    np.testing.assert_allclose(latents[1], latents[0], atol=1e-4 if exact else 1e-2)


def test_what_cannot_be_streamed_is_refused(tmp_path):
    pipeline = load_pipeline("tiny")
    with pytest.raises(UserError, match="--blocks_in_memory 0 is not possible; valid: 1 or more"):
        with streamed(pipeline, 0):
            pass
    with pytest.raises(UserError, match="for models of 16 bits and INT8.* use --low-memory"):
        with streamed(quantized_pipeline(), 1):
            pass
    with low_memory(pipeline), pytest.raises(UserError, match="--low-memory .*give one of them"):
        with streamed(pipeline, 1):
            pass
    base = ("src.generate", "--prompt", PROMPTS[0], "--steps", "1")
    result = run_here(*base, "--blocks_in_memory", "2", cwd=tmp_path)
    assert_one_error_line(result, "--blocks_in_memory 2 needs --enable_block_swap")


def test_what_is_known_before_is_refused_before_the_model_is_opened(tmp_path):
    """None of these models could be opened."""
    base = ("src.generate", "--prompt", PROMPTS[0], "--enable_block_swap")
    result = run_here(*base, "--model", "absent", "--blocks_in_memory", "0", cwd=tmp_path)
    assert_one_error_line(result, "--blocks_in_memory 0 is not possible")
    result = run_here(*base, "--model", "absent", "--low-memory", cwd=tmp_path)
    assert_one_error_line(result, "--low-memory", "give one of them")
    save_model(quantized_pipeline(), tmp_path / "saved")
    (tmp_path / "saved" / "model.safetensors").unlink()
    result = run_here(*base, "--model", "saved", cwd=tmp_path)
    assert_one_error_line(result, "saved has packed codes", "--low-memory")


def test_no_temporary_folder_where_there_is_a_file_to_read(tmp_path, monkeypatch):
    pipeline = load_pipeline("tiny")
    path = tmp_path / "a.safetensors"
    save_tensors(path, dict(tree_flatten(pipeline.transformer.parameters())))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with streamed(pipeline, 1, lambda: mx.load(str(path))):
        pipeline.sample(PROMPTS[:1], [0], num_steps=1)


@pytest.mark.slow
def test_the_command_draws_the_same_bytes(tmp_path):
    one, two = (
        generate(PROMPTS, tmp_path / "x.png", num_steps=2, blocks_in_memory=keep)
        for keep in (None, 2)
    )
    plain = [path.read_bytes() for path in one]
    assert [path.read_bytes() for path in two] == plain
    result = run_here(
        "src.generate", "--prompt", PROMPTS[0], "--steps", "2", "--output", "y.png",
        "--enable-block-swap", "--blocks-in-memory", "2", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
