"""Our transformer and the checkpoint reader against the published packages themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from src.models.checkpoints import load_transformer
from src.models.sd3 import velocity_by_diffusionkit

import mlx.core as mx
import pytest

from .helpers import random_inputs, random_model, relative_error
from .published_models import (
    SD3,
    SD35_LARGE,
    SD35_MEDIUM,
    diffusers_model,
    run_diffusers,
    without_k_bias,
)

pytestmark = [pytest.mark.sd3, pytest.mark.slow]

SIZES = [(16, 16), (32, 32), (8, 20)]


@pytest.mark.parametrize("config", [SD3, SD35_LARGE], ids=["sd3", "sd3.5-large"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("timestep", [1000.0, 967.0, 250.5, 3.0])
def test_equals_diffusionkit(config, size, timestep):
    """Exact GELU, which is DiffusionKit's, and k biases of zero, which it drops."""
    ours = without_k_bias(random_model(replace(config, gelu="exact")))
    inputs = random_inputs(config, *size)
    wanted = velocity_by_diffusionkit(ours, *inputs, timestep)
    assert relative_error(ours(*inputs, mx.full((2,), timestep)), wanted) < 2e-5


@pytest.mark.parametrize(
    "config", [SD3, SD35_LARGE, SD35_MEDIUM], ids=["sd3", "sd3.5-large", "sd3.5-medium"]
)
@pytest.mark.parametrize("size", SIZES)
def test_equals_diffusers(config, size, tmp_path: Path):
    """k biases, tanh GELU, QK norm, dual attention; through the shards that diffusers saves."""
    theirs = diffusers_model(random_model(config))
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_transformer(tmp_path)
    assert loaded.config == config
    inputs = (*random_inputs(config, *size), mx.array([967.0, 31.5]))
    assert relative_error(loaded(*inputs), run_diffusers(theirs, *inputs)) < 2e-5
