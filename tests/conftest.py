"""What holds for all tests."""

import src  # noqa: F401  before any mlx.core, so that OpenBLAS is the one that multiplies

from hypothesis import settings

# No deadline, since CI's machine may pause.
settings.register_profile("ditq", deadline=None, max_examples=50)
settings.load_profile("ditq")
