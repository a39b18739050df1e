"""The attention that learning uses: near the exact one, forward and backward."""

from __future__ import annotations

from src.models.mmdit import attend as exact
from src.quant.attention import fused_attention, plain_attention

import mlx.core as mx
import numpy as np
import pytest


@pytest.mark.parametrize(
    ("own", "forward", "backward"), [(fused_attention, 1e-3, 2e-2), (plain_attention, 1e-6, 1e-6)]
)
@pytest.mark.parametrize("cotangent_scale", [1.0, 1e-9])
def test_gradients_stay_near_those_of_float32_however_small(
    cotangent_scale, own, forward, backward
):
    def attend(q, k, v):
        return own(q, k, v).transpose(0, 2, 1, 3).flatten(2)

    rng = np.random.default_rng(0)
    q, k, v = (mx.array(rng.standard_normal((2, 3, 40, 16)).astype(np.float32)) for _ in range(3))
    pull = cotangent_scale * mx.array(rng.standard_normal((2, 40, 48)).astype(np.float32))
    wanted, wanted_gradients = mx.vjp(exact, [q, k, v], [pull])
    got, gradients = mx.vjp(attend, [q, k, v], [pull])
    assert got[0].dtype == mx.float32 and relative(got[0], wanted[0]) < forward
    for found, expected in zip(gradients, wanted_gradients, strict=True):
        assert found.dtype == mx.float32 and relative(found, expected) < backward


def relative(got: mx.array, wanted: mx.array) -> float:
    return (mx.linalg.norm(got - wanted) / mx.linalg.norm(wanted)).item()
