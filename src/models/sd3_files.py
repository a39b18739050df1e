"""Where the parts of a Stable Diffusion 3 lie: a single file, a folder, or the hub's cache.

Nothing here touches the network. A part is looked for inside the checkpoint, then beside it, then
in the hub's cache, where DiffusionKit and diffusers leave what they download.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import UserError
from ..store import load_folder, load_tensors, read_header
from .checkpoints import stem_of

TRANSFORMER = "model.diffusion_model."
VAE = "first_stage_model."
WEIGHTS = ".safetensors"
LINK = "https://huggingface.co/"


@dataclass(frozen=True)
class Repository:
    """Where a transformer is published, with its VAE: a single file of a hub's repository."""

    name: str
    file: str


# What is downloaded; Argmax's are DiffusionKit's own, which has no sd3.5-medium.
PUBLISHED = {
    "sd3-medium": Repository("argmaxinc/mlx-stable-diffusion-3-medium", "sd3_medium.safetensors"),
    "sd3.5-medium": Repository(
        "stabilityai/stable-diffusion-3.5-medium", "sd3.5_medium.safetensors"
    ),
    "sd3.5-large": Repository(
        "argmaxinc/mlx-stable-diffusion-3.5-large", "sd3.5_large.safetensors"
    ),
}
# Taken where the hub's cache has them already.
ALTERNATIVES = {
    "sd3-medium": (
        "stabilityai/stable-diffusion-3-medium",
        "stabilityai/stable-diffusion-3-medium-diffusers",
    ),
    "sd3.5-medium": (),
    "sd3.5-large": ("stabilityai/stable-diffusion-3.5-large",),
}
ENCODERS = "argmaxinc/stable-diffusion"
T5_TOKENIZER = "google/t5-v1_1-xxl"


@dataclass(frozen=True)
class Part:
    """One part beside the transformer: how people call it, and the names under which it is kept."""

    title: str
    inside: str  # the prefix of its tensors in a single file
    places: tuple[str, ...]  # relative to a folder: diffusers', Stability's, DiffusionKit's
    published: Repository | None = None


PARTS = {
    "clip_l": Part(
        "CLIP-L text encoder",
        "text_encoders.clip_l.transformer.",
        ("text_encoder", "text_encoders/clip_l.safetensors", "clip_l/model.fp16.safetensors")
        + ("clip_l.safetensors",),
        Repository(ENCODERS, "clip_l/model.fp16.safetensors"),
    ),
    "clip_g": Part(
        "CLIP-G text encoder",
        "text_encoders.clip_g.transformer.",
        ("text_encoder_2", "text_encoders/clip_g.safetensors", "clip_g/model.fp16.safetensors")
        + ("clip_g.safetensors",),
        Repository(ENCODERS, "clip_g/model.fp16.safetensors"),
    ),
    "t5": Part(
        "T5 text encoder",
        "text_encoders.t5xxl.transformer.",
        ("text_encoder_3", "text_encoders/t5xxl_fp16.safetensors", "t5/t5xxl.safetensors")
        + ("t5xxl_fp16.safetensors",),
        Repository(ENCODERS, "t5/t5xxl.safetensors"),
    ),
    "vae": Part("VAE", VAE, ("vae",)),
}
CLIP_TOKENIZER_FILES = ("vocab.json", "merges.txt")
# Folders, and the sets of files of which one must be in them as a whole.
TOKENIZERS = {
    "clip_l": (("tokenizer", "tokenizer_l"), (CLIP_TOKENIZER_FILES,)),
    "clip_g": (("tokenizer_2", "tokenizer_g"), (CLIP_TOKENIZER_FILES,)),
    "t5": (("tokenizer_3", "."), (("spiece.model",), ("tokenizer.json",))),
}


@dataclass(frozen=True)
class Location:
    """Some tensors on disk: a file or a folder, and the prefix of their names there."""

    path: Path
    prefix: str = ""

    def tensors(self) -> dict[str, mx.array]:
        """Not read yet, under names without the prefix."""
        if self.path.is_dir():
            found = load_folder(self.path, stem=stem_of(self.path))
        else:
            found = load_tensors(self.path, hint="download it again")
        return {
            name.removeprefix(self.prefix): tensor
            for name, tensor in found.items()
            if name.startswith(self.prefix)
        }


@dataclass(frozen=True)
class Files:
    """A checkpoint whose transformer was found; its other parts are looked for when needed."""

    transformer: Path  # for `checkpoints.read_weights`
    folders: tuple[Path, ...]  # where the other parts may lie, in order
    asked: Path | None  # what the user named; none: the hub's repositories

    def places(self) -> tuple[Path, ...]:
        """The folders; where nothing was named, what has been downloaded since as well."""
        return self.folders if self.asked else (*self.folders, *snapshots())

    def part(self, name: str) -> Location | None:
        """Inside the transformer's file, or beside it, or in the hub's cache."""
        part = PARTS[name]
        if self.transformer.is_file() and holds(self.transformer, part.inside):
            return Location(self.transformer, part.inside)
        for folder in self.places():
            for place in part.places:
                path = folder / place
                if path.is_file() or (path.is_dir() and any(path.glob(f"*{WEIGHTS}"))):
                    return Location(path)
        return None

    def tokenizer(self, name: str) -> Path | None:
        """The folder with the tokenizer's files, all of them."""
        names, sets = TOKENIZERS[name]
        for folder in self.places():
            for place in names:
                if any(all((folder / place / file).is_file() for file in files) for files in sets):
                    return folder / place
        return None

    def missing(self, name: str, places: tuple[str, ...], title: str) -> UserError:
        """What to say where a part is nowhere."""
        where = self.asked or "the hub's cache"
        way_out = "copy it there, or name the folder of a whole model with --checkpoint"
        if name == "t5":
            way_out += ", or go without it: --no-t5"
        return UserError(f"{where} has no {title} (looked for {', '.join(places)}); {way_out}")


def holds(file: Path, prefix: str) -> bool:
    """Whether tensors of a file begin so."""
    return any(name.startswith(prefix) for name in read_header(file, "download it again")[0])


def cache_folder() -> Path:
    """The hub's cache, by its own environment variables."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME")
    if home is None:
        home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(home).expanduser() / "hub"


def snapshot(repository: str, cache: Path | None = None) -> Path | None:
    """The folder of a repository's downloaded commit, the one that `main` named last."""
    folder = (cache or cache_folder()) / f"models--{repository.replace('/', '--')}"
    reference = folder / "refs" / "main"
    if not reference.is_file():
        return None
    found = folder / "snapshots" / reference.read_text(encoding="utf-8").strip()
    return found if found.is_dir() else None


def snapshots(cache: Path | None = None) -> Iterator[Path]:
    """Folders of the hub's cache that may hold parts of a Stable Diffusion 3."""
    names = [ENCODERS, T5_TOKENIZER]
    for model in PUBLISHED:
        names += [PUBLISHED[model].name, *ALTERNATIVES[model]]
    for name in dict.fromkeys(names):
        if found := snapshot(name, cache):
            yield found


def files_of(checkpoint: Path, model: str | None) -> Files:
    """The files of a checkpoint that the user names: offline, whatever it lacks."""
    if not checkpoint.exists():
        raise UserError(
            f"--checkpoint {checkpoint} does not exist; give a .safetensors file or the folder "
            "of a Stable Diffusion 3"
        )
    if checkpoint.is_file():
        return Files(checkpoint, (checkpoint.parent, *snapshots()), checkpoint)
    if cache := cache_within(checkpoint):
        return cached_files(model, cache, checkpoint)
    return Files(transformer_in(checkpoint, model), (checkpoint, *snapshots()), checkpoint)


def cache_within(folder: Path) -> Path | None:
    """The folder itself or its hub/, where it is a cache of the hub."""
    for cache in (folder, folder / "hub"):
        if any(cache.glob("models--*")):
            return cache
    return None


def cached_files(model: str | None, cache: Path, asked: Path | None) -> Files:
    """A model in the hub's cache; an error where it is not there."""
    if model is None:
        raise UserError(f"{asked} is a cache of several models; name one of them with --model")
    if found := find_cached(model, cache, asked):
        return found
    names = [PUBLISHED[model].name, *ALTERNATIVES[model]]
    raise UserError(f"{asked} holds no {model} (looked for {', '.join(dict.fromkeys(names))})")


def find_cached(model: str, cache: Path | None = None, asked: Path | None = None) -> Files | None:
    """The model's files in the hub's cache, if its transformer is there."""
    published = PUBLISHED[model]
    folders = tuple(snapshots(cache))
    for repository in dict.fromkeys((published.name, *ALTERNATIVES[model])):
        folder = snapshot(repository, cache)
        if folder is None:
            continue
        others = tuple(f for f in folders if f != folder)
        if (folder / published.file).is_file():
            return Files(folder / published.file, (folder, *others), asked)
        if any((folder / "transformer").glob(f"*{WEIGHTS}")):
            return Files(folder / "transformer", (folder, *others), asked)
    return None


def transformer_in(folder: Path, model: str | None) -> Path:
    """The file or folder of the transformer's weights inside a model's folder."""
    if (folder / "transformer").is_dir():
        return folder / "transformer"
    candidates = sorted(folder.glob(f"*{WEIGHTS}"))
    if any(path.name.startswith("diffusion_pytorch_model") for path in candidates):
        return folder  # diffusers' transformer by itself
    known = [path for path in candidates if model and path.name == PUBLISHED[model].file]
    found = known or [path for path in candidates if holds(path, TRANSFORMER)] or candidates
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in found)
    if not found:
        raise UserError(
            f"{folder} holds no Stable Diffusion 3: neither transformer/ nor a {WEIGHTS} file"
        )
    raise UserError(f"{folder} holds several transformers ({names}); name one with --checkpoint")
