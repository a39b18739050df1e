"""What holds for all tests."""

import os

# Tolerances are those of float32; on a GPU MLX multiplies it in TF32 unless told otherwise.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import src  # noqa: F401  before any mlx.core, so that OpenBLAS is the one that multiplies

import pytest
from hypothesis import settings

from .helpers import refuse_network

# No deadline, since CI's machine may pause.
settings.register_profile("ditq", deadline=None, max_examples=50)
settings.load_profile("ditq")

# Kernels are chosen as shipped, whatever `ditq tune` has found on this machine.
os.environ["DITQ_TUNING"] = "off"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Every connection is refused, and the hub's cache is empty."""
    refuse_network(monkeypatch, tmp_path / "no-cache")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A complete Stable Diffusion 3 of a few megabytes, in all layouts; tests only read it."""
    from .tiny_sd3 import write_tiny_sd3  # needs the extra [sd3]

    return write_tiny_sd3(tmp_path_factory.mktemp("tiny"))
