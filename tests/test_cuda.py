"""What MLX is told of an NVIDIA GPU, before its first computation and in each process anew."""

from __future__ import annotations

import os
import subprocess
import sys

from src.cuda import FEW, GRAPHS, KERNELS_AT_ONCE

import pytest

from .helpers import ROOT

CODE = f"""
import os
import src
from src.cuda import launch_singly

def told():
    print(os.environ.get("{KERNELS_AT_ONCE}"), os.environ.get("{GRAPHS}"))

told()
launch_singly()
told()
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="there is no such GPU in a Mac")
@pytest.mark.parametrize(
    "given, drawing, learning",
    [
        ({}, f"{FEW} None", "None 0"),
        ({KERNELS_AT_ONCE: "7", GRAPHS: "1"}, "7 1", "7 1"),
    ],
)
def test_drawing_keeps_few_kernels_under_way_and_learning_goes_without_graphs(
    given, drawing, learning
):
    """What the user has set stays."""
    kept = {k: v for k, v in os.environ.items() if k not in (KERNELS_AT_ONCE, GRAPHS)}
    result = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=kept | given, capture_output=True, text=True
    )
    assert result.stdout.splitlines() == [drawing, learning], result.stderr
