"""Where pictures come from: a folder, or a model that draws them; always in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import UserError
from ..inference.int8 import OFF, Int8, int8_layers, open_with_int8
from ..inference.saved import check_sigmas, is_saved
from ..metrics.fidelity import KeepSteps
from ..models.load import MODELS, SD3, Model, ModelChoice
from ..models.pipeline import Pipeline
from ..models.prompts import load_prompts
from ..sampling import Noise, Step, uses_guidance
from ..store import short_hash
from ..store.files import one_line

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
MODES = ("RGB", "L", "P", "1")  # of Pillow: 8 bits a channel or fewer, not transparent
STATISTICS = ".npz"
NANOS = tuple(name for name in MODELS if name not in SD3)  # those that read nano's captions
DTYPES = {"float16": mx.float16, "float32": mx.float32}


@dataclass(frozen=True)
class Batch:
    names: Sequence[str]
    pictures: np.ndarray  # 8 bits, (n, height, width, 3)
    prompts: Sequence[str] = ()  # of a model's, or a folder's captions
    latents: mx.array | None = None
    steps: list[Step] = field(default_factory=list)  # of a model's, where they were asked for


@dataclass(frozen=True)
class Folder:
    """All pictures in a folder, by name; of one size."""

    path: Path
    names: list[str]
    size: tuple[int, int]  # height, width
    captions: Sequence[str] = ()  # a picture each, where every one says that nano drew it

    def batches(self, size: int, trail: int = 0) -> Iterator[Batch]:
        for start in range(0, len(self.names), size):
            rows = slice(start, start + size)
            pictures = np.stack([self.picture(name) for name in self.names[rows]])
            yield Batch(self.names[rows], pictures, self.captions[rows])

    def picture(self, name: str) -> np.ndarray:
        path = self.path / name
        try:
            with Image.open(path) as image:
                picture = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise unreadable(path, error) from None
        if picture.shape[:2] != self.size:
            raise UserError(f"{path} was changed while it was looked at; run this again")
        return picture

    def described(self) -> dict[str, Any]:
        return {"folder": str(self.path), "count": len(self.names), "size": list(self.size)}

    @property
    def title(self) -> str:
        return str(self.path)


def open_folder(path: Path) -> Folder:
    """Its pictures; every file is opened here, so that what is wrong is said before any work."""
    try:
        names = sorted(p.name for p in path.iterdir() if p.suffix.lower() in ENDINGS)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a folder of pictures") from None
    if not names:
        raise UserError(f"{path} holds no pictures; valid endings: {', '.join(ENDINGS)}")
    looks = {name: checked(path / name) for name in names}
    first, _ = looks[names[0]]
    for name, (size, _) in looks.items():
        if size != first:
            raise UserError(
                f"{path / name} has {size[0]}x{size[1]} pixels, {names[0]} has "
                f"{first[0]}x{first[1]}; give pictures of one size"
            )
    captions = [caption for _, caption in looks.values() if caption is not None]
    return Folder(path, names, first, captions if len(captions) == len(names) else ())


def checked(path: Path) -> tuple[tuple[int, int], str | None]:
    """Height and width of a sound picture, and its caption if it is a PNG of nano's."""
    try:
        with Image.open(path) as image:
            mode, size = image.mode, (image.height, image.width)
            caption = image.info.get("prompt") if image.info.get("model") in NANOS else None
            image.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise unreadable(path, error) from None
    if mode not in MODES:
        raise UserError(
            f"{path} is a picture of mode {mode}; valid: {', '.join(MODES)} (8 bits a channel, "
            "not transparent)"
        )
    return size, caption


def unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} cannot be read as a picture ({one_line(error)}); remove it or make it again"
    )


@dataclass(frozen=True)
class Drawing:
    """Pictures that a model draws: prompt i, in turn, with the noise of seeds[i]."""

    model: Model  # as it was asked for
    pipeline: Pipeline
    prompts: list[str]
    seeds: list[int]
    num_steps: int
    cfg_weight: float

    @property
    def names(self) -> list[str]:
        return [f"{index:05d}" for index in range(len(self.prompts))]

    @property
    def size(self) -> tuple[int, int]:
        return self.pipeline.defaults.height, self.pipeline.defaults.width

    @property
    def sigmas(self) -> list[float]:
        """Of the steps, without the final 0."""
        return self.pipeline.sigmas(self.num_steps)[:-1].tolist()

    def batches(self, size: int, trail: int = 0) -> Iterator[Batch]:
        """Of the first `trail` pictures or a few more, to fill a batch, the steps are kept."""
        names = self.names
        for start in range(0, len(names), size):
            rows = slice(start, start + size)
            keep = KeepSteps(1)
            latents = self.pipeline.sample(
                self.prompts[rows],
                self.seeds[rows],
                num_steps=self.num_steps,
                cfg_weight=self.cfg_weight,
                callbacks=[keep] if start < trail else [],
            )
            self.check(latents, names[rows])
            pictures = self.pipeline.decode(latents)
            yield Batch(names[rows], pictures, self.prompts[rows], latents, keep.kept)

    def check(self, latents: mx.array, names: Sequence[str]) -> None:
        """A picture of 8 bits would hide what is not finite."""
        bad = ~np.isfinite(np.array(latents.astype(mx.float32))).all(axis=(1, 2, 3))
        if bad.any():
            first = names[int(np.argmax(bad))]
            raise UserError(
                f"{self.model} draws picture {first} with values that are not finite; its weights "
                "or scales are unusable"
            )

    def described(self) -> dict[str, Any]:
        return {
            "model": self.pipeline.name,
            "opened": str(self.model),
            "sha256": self.pipeline.hash,
            "INT8 layers": len(int8_layers(self.pipeline.transformer)),
            "computed in": str(self.pipeline.dtype).removeprefix("mlx.core."),
            "count": len(self.prompts),
            "size": list(self.size),
            "seeds": [self.seeds[0], self.seeds[-1]],
            "steps": self.num_steps,
            "guidance": self.cfg_weight,
        }

    @property
    def title(self) -> str:
        return f"{self.model} ({short_hash(self.pipeline.hash)})"


@dataclass(frozen=True)
class Order:
    """What models are to draw; what is not given is the first model's default."""

    prompts: str | None = None
    num_images: int | None = None
    num_steps: int | None = None
    cfg_weight: float | None = None
    kernel: str | None = None
    dtype: str | None = None
    int8: Int8 = OFF

    def __post_init__(self) -> None:
        if self.num_images is not None and self.num_images < 1:
            raise UserError(f"--num-images {self.num_images} is not possible; valid: 1 or more")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype} is unknown; valid: {', '.join(DTYPES)}")

    def open(self, model: Model, seed: int) -> Drawing:
        """Everything that could be refused is refused here."""
        dtype = None if self.dtype is None else DTYPES[self.dtype]
        pipeline = open_with_int8(model, dtype, kernel=self.kernel, int8=self.int8)
        texts = load_prompts(self.prompts or f"{pipeline.prompts}_evaluation")
        count = len(texts) if self.num_images is None else self.num_images
        defaults = pipeline.defaults
        drawing = Drawing(
            model,
            pipeline,
            [texts[i % len(texts)] for i in range(count)],
            [seed + i for i in range(count)],
            defaults.num_steps if self.num_steps is None else self.num_steps,
            defaults.cfg_weight if self.cfg_weight is None else self.cfg_weight,
        )
        uses_guidance(drawing.cfg_weight)
        Noise(drawing.seeds)
        check_sigmas(pipeline.transformer, drawing.sigmas)
        pipeline.check(drawing.prompts)
        return drawing


def is_model(source: Model) -> bool:
    """Whether it is a model, rather than a folder of pictures."""
    if isinstance(source, ModelChoice) or source in MODELS:
        return True
    return (Path(source) / "config.json").is_file() or is_saved(source)


def is_statistics(source: Model) -> bool:
    return isinstance(source, str) and Path(source).suffix.lower() == STATISTICS
