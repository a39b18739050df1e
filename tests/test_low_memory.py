"""Modulation computed ahead: the same pictures, without its weights in memory."""

from __future__ import annotations

from src.backends import staying_packed
from src.errors import UserError
from src.generate import generate
from src.inference.export import save_model
from src.inference.low_memory import low_memory, released_tensors
from src.inference.saved import open_pipeline, reread_saved
from src.models.load import load_pipeline
from src.sampling import Noise, denoise

import mlx.core as mx
import numpy as np
import pytest

from .helpers import assert_one_error_line, relative_error, run_here
from .quantized_models import quantized_pipeline

PROMPTS = [
    "a large red star in the center on a night background",
    "a small blue ring at the top on a night background",
    "a large red star to the left of a small blue ring on a night background",
]


def pictures(pipeline, **settings) -> list[np.ndarray]:
    return [
        np.array(pipeline.sample([prompt], [seed], num_steps=3, **settings))
        for seed, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("cfg_weight", [4.0, 0.0])
def test_three_prompts_in_a_row_are_the_same_bit_for_bit(quantized, cfg_weight):
    pipeline = quantized_pipeline(kernel=staying_packed()) if quantized else load_pipeline("tiny")
    wanted = pictures(pipeline, cfg_weight=cfg_weight)
    with low_memory(pipeline):
        low = pictures(pipeline, cfg_weight=cfg_weight)
    after = pictures(pipeline, cfg_weight=cfg_weight)
    for one, other, third in zip(wanted, low, after, strict=True):
        np.testing.assert_array_equal(other, one)
        np.testing.assert_array_equal(third, one)


def test_a_saved_model_reads_its_own_folder_again(tmp_path):
    save_model(quantized_pipeline(), tmp_path / "saved")
    plain = pictures(open_pipeline(str(tmp_path / "saved")))
    pipeline = open_pipeline(str(tmp_path / "saved"), kernel=staying_packed())
    with low_memory(pipeline, reread_saved(tmp_path / "saved")):
        for one, other in zip(plain, pictures(pipeline), strict=True):
            np.testing.assert_array_equal(other, one)


class MemoryAtSteps:
    """The bytes that MLX holds after each step."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def step(self, step) -> None:
        self.bytes.append(mx.get_active_memory())


def test_the_weights_are_not_in_memory_while_denoising():
    pipeline = quantized_pipeline(kernel=staying_packed(), modulation=False)
    weights = sum(t.nbytes for t in released_tensors(pipeline.transformer).values())
    plain, low = MemoryAtSteps(), MemoryAtSteps()
    pipeline.sample(PROMPTS[:1], [0], num_steps=3, callbacks=[plain])
    with low_memory(pipeline):
        for seed, prompt in enumerate(PROMPTS):
            pipeline.sample([prompt], [seed], num_steps=3, callbacks=[low])
    table = 3 * 2 * 4 * 64 * (6 + 6 + 6 + 2 + 2)  # steps, rows, float32, hidden, parts
    for before, after in zip(plain.bytes * 3, low.bytes, strict=True):
        assert before - after > 0.95 * (weights - table)


def test_weights_are_back_whatever_happens(tmp_path):
    pipeline = quantized_pipeline(kernel=staying_packed())
    wanted = pictures(pipeline)

    class Stop:
        def step(self, step) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), low_memory(pipeline):
        pipeline.sample(PROMPTS[:1], [0], num_steps=3, callbacks=[Stop()])
    for one, other in zip(wanted, pictures(pipeline), strict=True):
        np.testing.assert_array_equal(other, one)


def test_a_call_without_a_table_reads_what_it_needs():
    """The transformer is whole at all times: other tools may call it as ever."""
    pipeline = quantized_pipeline(kernel=staying_packed())
    inputs = mx.random.normal((1, 8, 8, 16)), mx.random.normal((1, 4, 32)), mx.zeros((1, 32))
    wanted = pipeline.transformer(*inputs, mx.array([500.0]))
    with low_memory(pipeline):
        assert mx.array_equal(pipeline.transformer(*inputs, mx.array([500.0])), wanted)


def test_a_sigma_that_was_not_computed_is_an_error():
    pipeline = load_pipeline("tiny")
    with low_memory(pipeline):
        conditioning = pipeline.condition(PROMPTS[:1], 4.0)
        velocity = pipeline.velocity(conditioning, 4.0, [1.0, 0.5])
        velocity(mx.zeros((1, 8, 8, 16)), mx.array(0.5))
        with pytest.raises(ValueError, match="not computed for sigma 0.6"):
            velocity(mx.zeros((1, 8, 8, 16)), mx.array(0.6))


@pytest.mark.slow
def test_compiled_steps_take_the_table_too():
    pipeline = load_pipeline("tiny")
    conditioning = pipeline.condition(PROMPTS[:1], 4.0)
    sigmas = pipeline.sigmas(4)
    latents = []
    for compiled in (False, True):
        with low_memory(pipeline):
            before = mx.get_active_memory()
            velocity = pipeline.velocity(conditioning, 4.0, sigmas[:-1].tolist(), compiled)
            latents.append(denoise(velocity, Noise([0]), sigmas, (8, 8, 16)))
            weights = sum(t.nbytes for t in released_tensors(pipeline.transformer).values())
            assert mx.get_active_memory() - before < 0.5 * weights  # nothing was read
    assert relative_error(latents[1], latents[0]) < 1e-4


def test_kernels_that_unpack_are_refused(tmp_path):
    pipeline = quantized_pipeline(kernel="dense")
    with pytest.raises(UserError, match=f"kernel dense unpacks.*--kernel {staying_packed()}"):
        with low_memory(pipeline):
            pass
    save_model(pipeline, tmp_path / "saved")
    result = run_here(
        "src.generate", "--model", "saved", "--prompt", PROMPTS[0], "--low-memory",
        "--kernel", "dense", cwd=tmp_path,
    )  # fmt: skip
    assert_one_error_line(result, "--low-memory", "dense", staying_packed())


@pytest.mark.slow
def test_the_command_draws_the_same_bytes(tmp_path):
    save_model(quantized_pipeline(), tmp_path / "saved")
    for model in ("tiny", str(tmp_path / "saved")):
        one, two = (
            generate(PROMPTS, tmp_path / "x.png", model=model, num_steps=2, low_memory=low)
            for low in (False, True)
        )
        plain = [path.read_bytes() for path in one]
        assert [path.read_bytes() for path in two] == plain
