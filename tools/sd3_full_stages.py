"""Which stages the full-size benchmark runs, and with which settings: small ones, and recorded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from src.inference.sd3_memory import SIXTEEN, W4A8, Precision
from src.models.sd3_files import PUBLISHED

CHECKPOINT, SAVED, CONVERTED = "checkpoint", "saved", "int8.safetensors"
CONFIG = "calibration_data/activations/quant_config.json"
PROMPT = "the"


@dataclass(frozen=True)
class Settings:
    """What every stage is told."""

    model: str
    pixels: tuple[int, ...] = (512, 1024)  # sides of the pictures; calibration is at the first
    t5: bool = True
    images: int = 2
    steps: int = 5
    stride: int = 2  # of the stored steps that are replayed; the last one has to be among them
    method: str = "grid"  # that rounds all blocks
    learned: str = "0-1"  # blocks that are also rounded by AdaRound, into a folder of their own
    iters: int = 20
    batch_size: int = 2  # rows of a minibatch of AdaRound
    encoder_bits: int = 8

    def described(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Stage:
    """One process: what it is called in the table, its module and its arguments."""

    name: str
    module: str
    arguments: tuple[str, ...]
    output: str | None = None  # whose bytes on disk are reported
    pixels: int | None = None
    # Whether it is judged by holding less than two copies of the 16-bit transformer.
    one_copy: bool = False
    # Of a picture: how the transformer is kept, for what `ditq doctor --sd3` tells of its memory.
    precision: Precision | None = None

    @property
    def command(self) -> str:
        return " ".join(["python -m", self.module, *self.arguments])


def stages(settings: Settings, tiny: bool) -> list[Stage]:
    """In their order; each has what the earlier ones made."""
    t5 = () if settings.t5 else ("--no-t5",)
    write = (settings.model, CHECKPOINT, *t5, *(("--tiny",) if tiny else ()))
    found = [
        Stage("write the checkpoint", "tools.sd3_full_weights", write, CHECKPOINT),
        Stage("open it, 16 bit", "tools.sd3_full_open", from_checkpoint(), one_copy=True),
        Stage(
            "convert_to_int8",
            "src.convert_to_int8",
            ("--input", f"{CHECKPOINT}/{PUBLISHED[settings.model].file}", "--output", CONVERTED)
            + ("--checkpoint_key", "model.diffusion_model")
            + (("--min_features", "64") if tiny else ()),
            CONVERTED,
            one_copy=True,
        ),
        *tracks(settings, t5),
        saving(settings, t5),
        Stage("open the saved one", "tools.sd3_full_open", ("--model", SAVED), one_copy=True),
    ]
    for pixels in settings.pixels:
        found += pictures(settings, t5, pixels)
    return found


def saving(settings: Settings, t5: tuple[str, ...]) -> Stage:
    """The quantized model as a folder, its text encoders and modulation too."""
    bits = ("--modulation-bits", "8", "--quantize-text-encoders", str(settings.encoder_bits))
    run = (*sized(settings.pixels[0]), "--num-steps", str(settings.steps))
    arguments = (*from_checkpoint(), *t5, *run, *bits, "--save", SAVED)
    return Stage(
        "load_adaround_model --save",
        "src.load_adaround_model",
        arguments,
        SAVED,
        settings.pixels[0],
        one_copy=True,
    )


def tracks(settings: Settings, t5: tuple[str, ...]) -> list[Stage]:
    """Calibration and both tracks."""
    given, stored = from_checkpoint(), ("--num-images", str(settings.images), "--batch-size", "1")
    first, replayed = settings.pixels[0], (*stored, "--stride", str(settings.stride))
    learning = ("--iters", str(settings.iters), "--batch-size", str(settings.batch_size))
    rounding = (*given, "--refine", "0", "--quant-config", CONFIG)
    return [
        Stage(
            "generate_calibration_data",
            "src.generate_calibration_data",
            (*given, *t5, *sized(first), *stored, "--num-steps", str(settings.steps)),
            "calibration_data",
            first,
        ),
        Stage("collect_layer_activations", "src.collect_layer_activations", (*given, *replayed)),
        Stage(
            "analyze_activations",
            "src.analyze_activations",
            (*given, "--tiers", "8", "--samples", "1", "--smooth", "spikes"),
        ),
        Stage(
            "cache_adaround_data",
            "src.cache_adaround_data",
            (*given, *replayed, "--entry-only"),
            "calibration_data/adaround_cache",
        ),
        Stage(
            f"adaround_optimize, all blocks by {settings.method}",
            "src.adaround_optimize",
            (*rounding, "--method", settings.method),
            "adaround_output",
        ),
        Stage(
            f"adaround_optimize, blocks {settings.learned} by adaround",
            "src.adaround_optimize",
            (*rounding, *learning, "--blocks", settings.learned, "--output-dir", "learned"),
            "learned",
        ),
    ]


def pictures(settings: Settings, t5: tuple[str, ...], pixels: int) -> Iterator[Stage]:
    """One picture each of the 16-bit model, of the converted one and of the saved one."""
    saved, sixteen = ("--model", SAVED), (*from_checkpoint(), *t5)
    asked = ("--prompt", PROMPT, "--steps", str(settings.steps), *sized(pixels))
    for name, model, precision in (
        ("generate, W4A8 --low-memory", (*saved, "--low-memory"), W4A8),
        ("generate, W4A8", saved, None),
        ("generate, INT8", (*sixteen, "--int8_checkpoint", CONVERTED), None),
        ("generate, 16 bit", sixteen, SIXTEEN),
    ):
        yield Stage(name, "src.generate", (*model, *asked), None, pixels, precision=precision)


def from_checkpoint() -> tuple[str, ...]:
    return ("--checkpoint", CHECKPOINT)


def sized(pixels: int) -> tuple[str, ...]:
    return ("--height", str(pixels), "--width", str(pixels))
