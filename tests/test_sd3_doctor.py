"""What `ditq doctor` tells of Stable Diffusion 3, without PyTorch or DiffusionKit."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from src.backends import BACKENDS, idle
from src.backends.cuda_int8 import CudaInt8
from src.doctor import sd3_state
from src.errors import UserError
from src.inference.self_tests import Check, kernel_checks, weights
from src.models import sd3_files
from src.models.sd3_versions import check_packages

import mlx.core as mx
import pytest

from .test_sd3_files import save, snapshot

MEDIUM = sd3_files.PUBLISHED["sd3-medium"]


def by_name(checks) -> dict[str, Check]:
    return {check.name: check for check in checks}


def cached_medium(cache: Path) -> Path:
    """The hub's cache with a transformer in it; the snapshot of the encoders, still empty."""
    file = snapshot(cache, MEDIUM.name) / MEDIUM.file
    save(file, {"model.diffusion_model.x": mx.zeros((1,)), "first_stage_model.x": mx.zeros((1,))})
    return snapshot(cache, sd3_files.ENCODERS)


def test_a_kernel_that_never_ran_has_not_passed():
    checks = by_name(kernel_checks())
    assert set(checks) == {f"kernel {name}" for name in BACKENDS if name != "reference"}
    for name, backend in BACKENDS.items():
        check = checks.get(f"kernel {name}")
        if check is not None and idle(backend):
            assert check.passed is None and "not used here: " in check.found
            assert check.found.split(": ")[1].removesuffix(" instead") in BACKENDS
        elif check is not None:
            assert check.passed and "relative error" in check.found
    if not mx.cuda.is_available():
        assert any(isinstance(b, CudaInt8) and idle(b) for b in BACKENDS.values())


def test_a_damaged_file_of_the_cache_is_a_line_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    cached_medium(tmp_path)
    file = sd3_files.snapshot(MEDIUM.name) / MEDIUM.file
    file.write_bytes(file.read_bytes()[:20])
    checks = by_name(weights(None))
    assert set(checks) == set(sd3_files.PUBLISHED), "the other models are told of too"
    damaged = checks["sd3-medium"]
    assert damaged.passed is False and str(file) in damaged.found
    assert checks["sd3.5-large"] == Check("sd3.5-large", "not downloaded")


@pytest.mark.parametrize("inner", ["", "hub"])
def test_another_cache_is_looked_through_for_every_model(tmp_path, monkeypatch, inner):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    cached_medium(tmp_path / inner)
    checks = by_name(weights(tmp_path))
    assert set(checks) == set(sd3_files.PUBLISHED)
    assert checks["sd3-medium"].found.startswith("transformer, VAE; without CLIP-L")
    assert all(check.passed is None for check in checks.values())


def test_every_tokenizer_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    encoders = cached_medium(tmp_path)
    (encoders / "tokenizer_l").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (encoders / "tokenizer_l" / name).write_text("{}")
    found = by_name(weights(None))["sd3-medium"].found
    assert "tokenizer of CLIP-G" in found and "tokenizer of T5" in found
    assert "tokenizer of CLIP-L" not in found


def test_the_state_of_the_packages_is_what_a_stage_would_say():
    try:
        check_packages()
        wanted = f"diffusionkit {importlib.metadata.version('diffusionkit')}"
    except UserError as error:
        wanted = str(error)
    assert sd3_state() == wanted
    if importlib.util.find_spec("sentencepiece") is None:
        assert "sentencepiece" in sd3_state()
