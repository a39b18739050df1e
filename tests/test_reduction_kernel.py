"""The CUDA kernels of the activation statistics against MLX's own reductions."""

from __future__ import annotations

from src.calibration.reduction_kernel import reduce_on_cuda
from src.calibration.reductions import reduce_input

import mlx.core as mx
import numpy as np
import pytest

needs_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="no NVIDIA GPU here")


@needs_cuda
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    ("samples", "halves", "tokens", "channels"),
    [(1, 1, 1, 1), (2, 2, 5, 130), (3, 1, 77, 192), (2, 2, 1024, 1536), (1, 2, 333, 6144)],
)
def test_kernels_give_what_mlx_gives(samples, halves, tokens, channels, centred, dtype):
    rng = np.random.default_rng(channels + tokens)
    values = 3 * rng.standard_normal((samples * halves, tokens, channels)) + 1
    x = mx.array(values.astype(np.float32)).astype(dtype)
    with mx.stream(mx.cpu):  # where sums are not rounded to TF32
        moments, counts = reduce_input(x, samples, centred)
        mx.eval(moments, counts)
    got, got_counts = reduce_on_cuda(x, samples, centred)
    assert mx.array_equal(got_counts, counts)
    assert mx.array_equal(got[:2], moments[:2])
    for found, wanted in zip(got[2:], moments[2:], strict=True):
        assert (mx.abs(found - wanted).max() <= 2e-5 * mx.abs(wanted).max()).item()


@needs_cuda
def test_kernels_read_inputs_that_do_not_lie_in_one_piece():
    x = mx.random.normal((2, 6, 64)).transpose(0, 2, 1)[:, ::2]
    wanted, got = reduce_on_cuda(mx.contiguous(x), 1, False), reduce_on_cuda(x, 1, False)
    assert all(mx.array_equal(one, other) for one, other in zip(got, wanted, strict=True))
