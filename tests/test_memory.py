"""The figures from shapes against what is really written and held."""

from __future__ import annotations

import gc
from contextlib import nullcontext

from src.inference.export import save_transformer
from src.inference.low_memory import low_memory
from src.inference.memory import Layout, disk_bytes, resident_bytes
from src.inference.saved import load_saved_transformer, reread_saved
from src.models.configs import config_named
from src.models.load import load_pipeline
from src.models.mmdit import MMDiT

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from .quantized_models import STEPS, quantized_pipeline

LAYOUT = Layout(steps=STEPS)
PROMPT = "a large red star in the center on a night background"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    pipeline = quantized_pipeline("nano")
    return save_transformer(pipeline.transformer, tmp_path_factory.mktemp("models") / "nano")


def test_disk_bytes_are_those_of_the_folder(saved):
    files = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    assert disk_bytes(config_named("nano"), LAYOUT).total == pytest.approx(files, rel=0.02)


@pytest.fixture
def no_cache():
    """Buffers of just the size that was asked for: used ones may be larger by two pages."""
    limit = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(limit)


@pytest.mark.slow
@pytest.mark.parametrize("low", [False, True])
def test_resident_bytes_are_what_mlx_holds(low, saved, no_cache):
    """After a step, with nothing of the picture left."""
    pipeline = load_pipeline("nano")
    pipeline.transformer = MMDiT(pipeline.transformer.config)  # its weights are let go
    conditioning, latent = pipeline.condition([PROMPT], 4.0), mx.zeros((1, 8, 8, 16))
    sigmas = pipeline.sigmas(6)[:-1].tolist()
    mx.eval(conditioning.text, conditioning.pooled, latent)
    gc.collect()
    before = mx.get_active_memory()
    pipeline.transformer = load_saved_transformer(saved, kernel="quantized_matmul")
    with low_memory(pipeline, reread_saved(saved)) if low else nullcontext():
        velocity = pipeline.velocity(conditioning, 4.0, sigmas)
        mx.eval(velocity(latent, mx.array(sigmas[2])))
        gc.collect()
        held = mx.get_active_memory() - before
    config = pipeline.transformer.config
    wide = 4 if mx.default_device() == mx.Device(mx.cpu) else 2
    found = resident_bytes(config, LAYOUT, low_memory=low, levels=6, float_bytes=wide)
    assert held == pytest.approx(found.total, rel=0.02)


def test_sd3_medium_fits_the_promise():
    config = config_named("sd3-medium")
    sixteen_bit = 2 * sum(t.size for _, t in tree_flatten(MMDiT(config).parameters()))
    assert sixteen_bit == pytest.approx(4.17e9, rel=0.01)
    assert disk_bytes(config, Layout()).total < 1.6e9
    low = resident_bytes(config, Layout(), low_memory=True)
    plain = resident_bytes(config, Layout(), low_memory=False)
    assert low.total < 1.0e9 < plain.total
    assert low.codes == plain.codes == disk_bytes(config, Layout()).codes


def test_groups_and_modulation_change_what_they_should():
    config = config_named("sd3-medium")
    plain = disk_bytes(config, Layout())
    assert disk_bytes(config, Layout(modulation_bits=16)).modulation > 1.35e9
    assert disk_bytes(config, Layout(modulation_group=64)).modulation > plain.modulation
    assert disk_bytes(config, Layout(bits=8)).codes == 2 * plain.codes
    floats = disk_bytes(config, Layout(steps=0))
    assert floats.vectors < plain.vectors and floats.codes == plain.codes
