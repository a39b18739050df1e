"""Runs one stage as `python -m` does, and writes down what memory it took.

    python -m tools.sd3_full_stage FIGURES.json src.analyze_activations --tiers 8

A process of its own for each stage: its peak is the stage's own.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

from src.cli import process_peak_bytes

import mlx.core as mx


def main(figures: Path, module: str, arguments: list[str]) -> None:
    """Runs the module; the figures are written however it ends."""
    mx.eval(mx.zeros(1) + 1)  # so that what the device itself takes is there from the start
    before, peaks, reset = process_peak_bytes(), [], mx.reset_peak_memory

    def keep_and_reset() -> None:
        # A stage that measures its parts by themselves would leave the last one's peak alone.
        peaks.append(mx.get_peak_memory())
        reset()

    mx.reset_peak_memory = keep_and_reset
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        found = {
            "mlx_peak_bytes": max([*peaks, mx.get_peak_memory()]),
            "process_peak_bytes": process_peak_bytes(),
            "process_start_bytes": before,
        }
        figures.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
