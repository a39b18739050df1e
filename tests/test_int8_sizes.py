"""What is counted of a timed step, and the tools that time one."""

from __future__ import annotations

import subprocess
import sys

from src.inference.kernels import TEXT_TOKENS
from src.inference.low_memory import released_tensors
from src.models.configs import config_named
from src.quant.packing import pack_codes

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from tools.bench_int8_sizes import ROWS, STYLES, Bench, lines_of, plot_sizes, sizes_of
from tools.int8_models import (
    BASE,
    STEPS,
    Model,
    held_bytes,
    inputs_of,
    model_of,
    packed_here,
    step_of,
    work_of,
)

from .helpers import ROOT

FOREVER, NEVER = float("inf"), float("-inf")


@pytest.fixture(scope="module")
def tiny() -> Model:
    model = model_of("tiny")
    model.draw_at(64)
    return model


class Counting(nn.Module):
    """A linear that adds up what it multiplies."""

    def __init__(self, linear: nn.Linear, kind: str, found: dict[str, int]) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._kind, self._found = kind, found

    def __call__(self, x: mx.array) -> mx.array:
        self._found[self._kind] += x.size // x.shape[-1] * self.weight.size
        return x @ self.weight.T + self.bias


def kind_of(path: str) -> str | None:
    """What a linear counts as; none where it is not counted."""
    if "adaLN" in path:
        return "modulation"
    return "linears" if "transformer_blocks" in path else None


@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("pixels", [32, 64])
@pytest.mark.parametrize("name", ["tiny", "tiny-3.5-medium", "tiny-3.5-large"])
def test_the_work_counted_from_shapes_is_what_a_step_does(name, pixels, pictures):
    model = model_of(name)
    transformer = model.exact.transformer
    found = {"linears": 0, "attention": 0, "modulation": 0}

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        batch, heads, tokens, width = q.shape
        found["attention"] += 2 * batch * heads * tokens * k.shape[2] * width
        return v.transpose(0, 2, 1, 3).flatten(2)

    for block in transformer.multimodal_transformer_blocks:
        block.use_attention(attend)
    linears = [
        (path, Counting(layer, kind, found))
        for path, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear) and (kind := kind_of(path))
    ]
    transformer.update_modules(tree_unflatten(linears))
    step_of(model.exact, inputs_of(model, pixels, pictures))()
    assert vars(work_of(config_named(name), pixels, pictures)) == found


def test_a_picture_of_sd3_medium_takes_so_many_multiply_adds():
    """By hand: 4096 and 154 tokens, 24 blocks of 12 squares of 1536, the last text block 3."""
    tokens, text, square = 4096, TEXT_TOKENS, 1536 * 1536
    linears = 24 * 12 * square * tokens + (23 * 12 + 3) * square * text
    attention = 24 * 2 * (tokens + text) ** 2 * 1536
    found = work_of(config_named("sd3-medium"), 1024)
    assert (found.linears, found.attention) == (2 * linears, 2 * attention)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_packed_on_the_device_are_those_of_the_store(bits):
    codes = mx.random.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 64))
    np.testing.assert_array_equal(packed_here(codes, bits), pack_codes(codes, bits))


def test_a_row_in_low_memory_draws_the_same_and_holds_less(tiny):
    """Its step gives the bits of the row that it is compared with; held are the vectors of all
    steps instead of what gave them."""
    bench, inputs = Bench(tiny, 1, FOREVER), inputs_of(tiny, 64, 2)
    wanted = step_of(tiny.exact, inputs)()
    rows = bench.measure(64, 2)["rows"]
    released = sum(t.nbytes for t in released_tensors(tiny.exact.transformer).values())
    vectors = STEPS * 4 * 64 * (2 * 6 + 6 + 2 + 2) * 4  # steps, rows, hidden, parts, float32
    assert rows[BASE]["held"] == held_bytes(tiny.exact.transformer)
    low = rows["16 bits, low memory"]["held"]
    assert rows[BASE]["held"] - low == released - vectors
    assert mx.array_equal(step_of(tiny.exact, inputs)(), wanted)
    assert rows["W4A8, low memory"]["held"] < rows["W4A8, as chosen"]["held"]


def test_layers_are_made_again_only_for_other_kernels(tiny):
    bench, row = Bench(tiny, 1, FOREVER), next(row for row in ROWS if row.bits == 4)
    made, held = bench.pipeline(row)
    assert bench.pipeline(row) == (made, held)
    bench.made[row.name] = ("another",), made, held
    again = bench.pipeline(row)
    assert again[0] is not made and again[1] == held


def test_without_time_every_row_is_left_out_by_name(tiny):
    found = Bench(tiny, 1, NEVER).measure(64, 1)
    assert found["rows"] == {}
    assert found["left_out"] == {row.name: "no time was left" for row in ROWS}


def test_few_pictures_come_first():
    assert sizes_of((1024, 512), (2, 1)) == [(512, 1), (1024, 1), (512, 2), (1024, 2)]


def test_a_report_names_what_was_left_out_and_the_plot_does_without(tiny, tmp_path):
    assert {row.name for row in ROWS} == {BASE, *STYLES}
    sizes = [Bench(tiny, 1, end).measure(64, n) for n, end in ((1, FOREVER), (2, NEVER))]
    del sizes[0]["rows"]["16 bits, low memory"]
    sizes[0]["left_out"]["16 bits, low memory"] = "out of memory"
    models = {"tiny": {"dtype": "float32", "sizes": sizes}, "large": {"sizes": []}}
    data = {"machine": {"device": "a device"}, "peaks": None, "models": models}
    text = "\n".join(lines_of(data, None))
    assert "Left out: 16 bits, low memory: out of memory." in text
    assert "## large, not reached" in text
    plot_sizes(data, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["bench_int8_sizes", "bench_int8_step"])
def test_the_tools_run_on_a_tiny_model(tool):
    command = [sys.executable, "-m", f"tools.{tool}", "--model", "tiny", "--pixels", "64"]
    command += ["--rounds", "1", "--dry-run"]
    command += ["--pictures", "1"] * (tool == "bench_int8_sizes")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for row in ("16 bits", "W4A16, MLX's own 4 bits", "W8A8, as chosen", "W4A8, as chosen"):
        assert f"| {row} |" in done.stdout
