"""Our packing against MLX's own quantization."""

from __future__ import annotations

from src.backends.weight import group_size
from src.errors import UserError
from src.quant.grid import code_range, dequantize
from src.quant.packing import from_affine, pack_codes, to_affine, unpack_codes

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

BITS = [2, 3, 4, 5, 6, 8]


def random_codes(seed, shape, bits) -> np.ndarray:
    low, high = code_range(bits)
    return np.random.default_rng(seed).integers(low, high + 1, shape).astype(np.int8)


@pytest.mark.parametrize("bits", BITS)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 9),
    groups=st.sampled_from([1, 2, 3, 6]),
    size=st.sampled_from([32, 64, 128]),
)
def test_mlx_reads_what_we_pack(bits, seed, rows, groups, size):
    codes = random_codes(seed, (rows, groups * size), bits)
    scale = np.random.default_rng(seed).uniform(1e-4, 1, (rows, groups)).astype(np.float32)
    packed, scales, biases, group_size = to_affine(codes, scale, bits)
    read = mx.dequantize(packed, scales, biases, group_size=group_size, bits=bits)
    wanted = np.array(dequantize(mx.array(codes), mx.array(scale)))
    # MLX adds bias to scale·q in floats, so the last digit may differ; the codes may not.
    np.testing.assert_allclose(np.array(read), wanted, rtol=0, atol=2e-7 * 2**bits * scale.max())
    np.testing.assert_array_equal(np.array(unpack_codes(packed, bits)), codes)
    back, scales_back = from_affine(packed, scales, biases, bits)
    np.testing.assert_array_equal(np.array(back), codes)
    np.testing.assert_array_equal(np.array(scales_back), scale)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_layout_is_bit_for_bit_that_of_mlx(bits, size):
    packed, scales, biases = mx.quantize(
        mx.random.normal((24, 384), key=mx.random.key(0)), group_size=size, bits=bits
    )
    # Read as w = scale·q + bias with scale 1 and bias 0, the weight is q itself.
    ones, zeros = mx.ones_like(scales), mx.zeros_like(scales)
    q = np.array(mx.dequantize(packed, ones, zeros, group_size=size, bits=bits))
    ours = pack_codes((q - 2 ** (bits - 1)).astype(np.int8), bits)
    np.testing.assert_array_equal(np.array(ours), np.array(packed))


def test_mlx_layer_runs_on_our_tensors():
    codes, scale = random_codes(0, (16, 192), 4), np.full((16, 1), 0.02, np.float32)
    layer = nn.QuantizedLinear(192, 16, bias=False, group_size=64, bits=4)
    layer.weight, layer.scales, layer.biases, size = to_affine(codes, scale, 4)
    assert size == 64
    x = np.random.default_rng(1).standard_normal((3, 192)).astype(np.float32)
    np.testing.assert_allclose(
        np.array(layer(mx.array(x))), x @ (codes * scale).T, rtol=1e-4, atol=1e-4
    )


def test_four_bits_are_code_plus_eight():
    packed, scales, biases, _ = to_affine(np.arange(-8, 8).repeat(2)[None], np.ones((1, 1)), 4)
    assert hex(packed[0, 0].item()) == "0x33221100" and hex(packed[0, 3].item()) == "0xffeeddcc"
    assert scales.tolist() == [[1.0]] and biases.tolist() == [[-8.0]]


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(UserError, match="codes from -9 to 0 do not fit in 4 bits; valid: -8 to 7"):
        pack_codes(np.array([[-9] + [0] * 31], np.int8), 4)
    with pytest.raises(UserError, match="48 columns cannot be packed; valid: multiples of 32"):
        pack_codes(np.zeros((2, 48), np.int8), 4)
    with pytest.raises(UserError, match="7 bits"):
        pack_codes(np.zeros((2, 64), np.int8), 7)
    with pytest.raises(UserError, match="groups of 16 of 64 columns are not MLX's"):
        to_affine(np.zeros((2, 64), np.int8), np.ones((2, 4)), 4)
    packed, scales, biases = mx.quantize(mx.random.normal((4, 64)), group_size=32, bits=4)
    with pytest.raises(UserError, match="biases other than"):
        from_affine(packed, scales, biases, 4)


@pytest.mark.parametrize(
    "columns, largest, size",
    [(1536, 128, 128), (96, 128, 32), (1536, 64, 64), (128, 128, 64), (64, 64, 32), (32, 128, 32)],
)
def test_a_row_has_several_groups_where_it_can(columns, largest, size):
    """MLX's kernel for a single one needs headers on Hopper that nobody may have."""
    assert group_size(columns, largest) == size
