"""A report of every part, made of random numbers of the real sizes: 93 inputs, 30 steps."""

from __future__ import annotations

from src.report.content import BlockErrors, PicturePair, Report, Rung, TierMap

import numpy as np

SCRIPT = '<script>document.title = "taken over"</script> & "quoted"'


def example_report(pictures: int = 6, side: int = 128) -> Report:
    """Every part filled; the first prompt tries to be HTML."""
    rng = np.random.default_rng(0)
    sigmas = list(np.linspace(1, 0.1, 30))
    return Report(
        title="nano at W4A8",
        settings={
            "model": "nano",
            "weights": "adaround_output, 4 bits, gptq",
            "weights' hash": 8 * "0123abcd",
            "activations": "calibration_data/activations/quant_config.json",
        },
        notes=["smoothing of 12 layers is left out, since their weights were rounded without it"],
        pairs=[pair(rng, i, side) for i in range(pictures)],
        summary={"PSNR": ["27.1 dB", "18.3 dB", "25.9 to 28.0 dB"], "SSIM": ["0.94", "0.71", ""]},
        summary_columns=("median", "worst", "95 % interval"),
        ladder=[
            Rung("RTN, W4", 6.8, 6.4, 7.3),
            Rung("RTN, W4A8, one scale a tensor", 5.1, 4.6, 5.7),
            Rung("GPTQ, W4A16", 12.2, 11.8, 12.6),
            Rung("GPTQ, W4A8", 11.4, 11.0, 11.9),
        ],
        tiers=tiers(rng, sigmas),
        blocks=BlockErrors({rung: falling(rng, db, 8) for rung, db in RUNGS.items()}),
        block_db={"image": falling(rng, 25, 8), "text": falling(rng, 22, 7)},
        step_db={"W4A16": falling(rng, 15, 30), "W4A8": falling(rng, 13, 30)},
        sigmas=sigmas,
        costs={
            "weights": {"16 bit": "21.1 MB", "quantized": "6.2 MB"},
            "seconds a step": {"16 bit": "0.051", "quantized": "0.060"},
        },
        highlights={"memory of the weights": "29 %", "median PSNR": "27.1 dB"},
    )


RUNGS = {"rtn": 20.9, "grid": 23.9, "gptq": 31.9}


def pair(rng: np.random.Generator, index: int, side: int) -> PicturePair:
    """White beside black, so that a wipe shows; noise would make a page of megabytes."""
    white = np.full((side, side, 3), 255, np.uint8)
    black = np.zeros((side, side, 3), np.uint8)
    prompt = SCRIPT if index == 0 else f"a large red star above {index} small blue rings"
    return PicturePair(prompt, index, white, black, {"PSNR": f"{rng.normal(27, 2):.1f} dB"})


def tiers(rng: np.random.Generator, sigmas: list[float]) -> TierMap:
    paths = [
        f"multimodal_transformer_blocks.{block}.{stream}_transformer_block.{role}"
        for block in range(8)
        for stream in ("image", "text")
        for role in (*(f"attn.{n}_proj" for n in "qkvo"), "mlp.fc1", "mlp.fc2")
        if not (block == 7 and stream == "text" and role in ("attn.o_proj", "mlp.fc1", "mlp.fc2"))
    ]
    bits = rng.choice([4, 6, 8], (len(paths), len(sigmas)), p=[0.2, 0.5, 0.3])
    return TierMap(paths, sigmas, bits)


def falling(rng: np.random.Generator, db: float, count: int) -> list[float]:
    return (db - np.linspace(0, 4, count) + rng.normal(0, 0.5, count)).tolist()
