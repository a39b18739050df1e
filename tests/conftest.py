"""What holds for all tests."""

import os

# Tolerances are those of float32; on a GPU MLX multiplies it in TF32 unless told otherwise.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import src  # noqa: F401  before any mlx.core, so that OpenBLAS is the one that multiplies

from hypothesis import settings

# No deadline, since CI's machine may pause.
settings.register_profile("ditq", deadline=None, max_examples=50)
settings.load_profile("ditq")

# Kernels are chosen as shipped, whatever `ditq tune` has found on this machine.
os.environ["DITQ_TUNING"] = "off"
