"""What quantized activations do to whole pictures of nano.

    python -m tools.bench_pictures --captions 64

Pictures of captions that calibration never saw are compared with those that the 16-bit model draws
of the same captions and seeds. Writes docs/benchmarks/activations_pictures.json and
activations_pictures.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from src.metrics.psnr import psnr
from src.metrics.signal import decibel
from src.sampling import Noise, denoise, guided, sd3_sigmas

import click
import mlx.core as mx
import numpy as np

from tools.activation_lab import Lab, Quantizers
from tools.bench_common import machine, write_report
from tools.bench_policies import ERROR, UNIFORM_A6, policies

SEED = 10_000


@dataclass(frozen=True)
class Drawn:
    """What the model makes of all captions."""

    latents: np.ndarray
    pictures: np.ndarray  # 8 bits

    @classmethod
    def by(cls, lab: Lab) -> Drawn:
        """The lab's model as it is now, over the whole schedule."""
        pipeline, defaults = lab.pipeline, lab.pipeline.defaults
        conditioning = pipeline.condition(lab.prompts, defaults.cfg_weight)
        call = lab.current.following(lab.model)

        def velocity(latent: mx.array, sigma: mx.array) -> mx.array:
            text, pooled = conditioning.text, conditioning.pooled
            return guided(call, latent, sigma, text, pooled, defaults.cfg_weight)

        latent = denoise(
            velocity,
            Noise([SEED + index for index in range(len(lab.prompts))]),
            sd3_sigmas(lab.trajectories.num_steps, defaults.shift),
            pipeline.latent_shape(defaults.height, defaults.width),
        )
        return cls(np.array(latent), pipeline.decode(latent))

    def against(self, wanted: Drawn) -> dict[str, float]:
        """dB of latents and pictures, each the median and the worst over the captions."""
        latents = [
            decibel(float(np.square(w).sum()), float(np.square(w - g).sum()))
            for w, g in zip(wanted.latents, self.latents, strict=True)
        ]
        pairs = zip(wanted.pictures, self.pictures, strict=True)
        pictures = [psnr(wanted_one, got) for wanted_one, got in pairs]
        return {
            "latent_median": float(np.median(latents)),
            "latent_worst": min(latents),
            "psnr_median": float(np.median(pictures)),
            "psnr_worst": min(pictures),
        }


def end_to_end(lab: Lab, rows: dict[str, Callable[[], Quantizers]]) -> dict[str, dict]:
    wanted, table = Drawn.by(lab), {}
    for name, quantizers in rows.items():
        with lab.quantized(quantizers()):
            table[name] = Drawn.by(lab).against(wanted)
        click.echo(f"{name}: {table[name]}")
    return table


def picture_lines(table: dict[str, dict]) -> list[str]:
    head = ["", "latent, median", "latent, worst", "PSNR, median", "PSNR, worst"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in table.items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.1f}" for value in row.values()) + " |")
    return [*lines, ""]


@click.command()
@click.option("--calib-dir", default="calibration_data", show_default=True, type=Path)
@click.option("--captions", default=64, show_default=True)
def main(calib_dir: Path, captions: int) -> None:
    """Draw the captions with the main rows of the ladder."""
    lab = Lab(calib_dir, captions, 1)
    choices, _ = policies(lab)
    rows = {
        "A8, one absmax scale": partial(lab.one_scale, 8, lab.paths),
        "A8, the stage's default": choices["uniform A8"],
        "A8, a scale per token": partial(lab.per_token, 8, lab.paths),
        ERROR.format(6): choices[ERROR.format(6)],
        "A6, the stage's default": choices[UNIFORM_A6],
    }
    data = {"machine": machine(), "captions": captions, "pictures": end_to_end(lab, rows)}
    lines = [
        f"Against the 16-bit model's pictures of the same {captions} captions and seeds, all "
        f"{lab.trajectories.num_steps} steps, weights at 16 bits; dB.",
        "",
        *picture_lines(data["pictures"]),
    ]
    write_report("activations_pictures", "Quantized activations in whole pictures", data, lines)


if __name__ == "__main__":
    main()
