"""What Stable Diffusion 3 is said to need in memory: the goals, and what the numbers depend on."""

from __future__ import annotations

from src.inference.sd3_memory import (
    CLIP_L,
    SIXTEEN,
    W4A8,
    clip_bytes,
    decoder_bytes,
    phases,
    step_bytes,
    table,
    transformer_bytes,
)
from src.models.configs import MMDiTConfig, config_named
from src.models.mmdit import MMDiT

import pytest
from mlx.utils import tree_flatten

from .helpers import assert_one_error_line, run_here

PROCESS = 0.5e9  # Python, MLX and DiffusionKit, roughly


@pytest.mark.parametrize("size", [512, 1024])
def test_sd3_medium_fits_small_macs(size):
    with_t5 = phases("sd3-medium", W4A8, size, size)
    without = phases("sd3-medium", W4A8, size, size, t5=False)
    assert [phase.name for phase in with_t5] == ["CLIP", "T5", "denoising", "VAE"]
    # A Mac lets its GPU have some two thirds of the memory.
    assert max(p.bytes for p in with_t5) + PROCESS < 8e9 * 2 / 3
    assert max(p.bytes for p in without) + PROCESS < 4e9


def test_published_sizes():
    """CLIP-L's and CLIP-G's parameter counts, as published."""
    assert clip_bytes(CLIP_L) / 2 == pytest.approx(123.06e6, rel=1e-3)
    assert clip_bytes() / 2 == pytest.approx(694.66e6, rel=1e-3)


@pytest.mark.parametrize("name", ["tiny", "tiny-3.5-medium", "sd3-medium"])
def test_a_16_bit_transformer_is_its_parameters(name):
    config: MMDiTConfig = config_named(name)
    numbers = sum(t.size for _, t in tree_flatten(MMDiT(config).parameters()))
    assert transformer_bytes(config, SIXTEEN) == 2 * numbers


def test_more_pixels_take_more():
    config = config_named("sd3-medium")
    assert step_bytes(config, 512, 512) < step_bytes(config, 512, 1024)
    assert decoder_bytes(512, 512) < decoder_bytes(1024, 512) < decoder_bytes(1024, 1024)
    assert step_bytes(config, 512, 512, fused_attention=False) > step_bytes(config, 512, 512)


@pytest.mark.slow
def test_the_table_has_every_model_size_and_precision():
    lines = table()
    assert len(lines) == 2 + 3 * 2 * 2
    for word in ("sd3-medium", "sd3.5-medium", "sd3.5-large", "W4A8", "1024²"):
        assert any(word in line for line in lines)


def test_a_checkpoint_without_sd3_is_refused(tmp_path):
    result = run_here("src.doctor", "--checkpoint", str(tmp_path))
    assert_one_error_line(result, "--sd3")
