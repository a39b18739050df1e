"""Reads what the weight track has finished, and refuses it where it is not whole or not of this
model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..store import MANIFEST_NAME, read_json, read_manifest, require_match
from .artifacts import (
    OUTPUT_FORMAT,
    OUTPUT_VERSION,
    QuantConfig,
    RoundedLayer,
    block_file,
    load_rounded_block,
)
from .grid import code_range

HINT = "run `python -m src.adaround_optimize` again"


@dataclass(frozen=True)
class RoundedModel:
    """All blocks of a finished weight track."""

    bits: int
    made_from: dict[str, Any]
    settings: dict[str, Any]
    layers: dict[str, RoundedLayer]  # by linear path


def load_rounded(folder: str | Path, model: str, model_hash: str, blocks: int) -> RoundedModel:
    """The rounded weights of a model with that many blocks; every file's hash is checked."""
    folder = Path(folder)
    require_folder(folder)
    if (folder / MANIFEST_NAME).exists():
        check_source(folder, model, model_hash)  # before blocks of another model are counted
    check_files(folder, blocks)
    manifest = read_manifest(folder, OUTPUT_FORMAT, OUTPUT_VERSION, HINT, verify=True)
    made_from, settings = manifest.get("made_from"), manifest.get("settings")
    if not isinstance(settings, dict):
        raise UserError(f"{folder / MANIFEST_NAME} has no settings; {HINT}")
    bits = settings.get("bits_w")
    if not isinstance(bits, int):
        raise UserError(f"{folder / MANIFEST_NAME} says no bits_w; {HINT}")
    layers: dict[str, RoundedLayer] = {}
    for index in range(blocks):
        found = load_rounded_block(folder, index)
        check_bits_of(folder / block_file(index), found, bits)
        layers |= found
    return RoundedModel(bits, made_from, settings, layers)


def source_of(folder: str | Path) -> dict[str, Any]:
    """What the weights were made from, as the manifest has it; no other file is read."""
    folder = Path(folder)
    require_folder(folder)
    path = folder / MANIFEST_NAME
    if not path.exists():  # it comes last
        read_manifest(folder, OUTPUT_FORMAT, OUTPUT_VERSION, HINT)
    made_from = read_json(path, OUTPUT_FORMAT, OUTPUT_VERSION, HINT).get("made_from")
    if not isinstance(made_from, dict) or not isinstance(made_from.get("model"), str):
        raise UserError(f"{path} names no model; {HINT}")
    return made_from


def check_source(folder: Path, model: str, model_hash: str) -> None:
    """Raises for the weights of another model."""
    made_from = source_of(folder)
    wanted = {**made_from, "model": model, "model_hash": model_hash}
    require_match(folder / MANIFEST_NAME, made_from, wanted, "give the model that it was made from")


def require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; run `python -m src.adaround_optimize` first")


def check_files(folder: Path, blocks: int) -> None:
    """Raises with the names of all blocks' files that are not there."""
    require_folder(folder)
    missing = [i for i in range(blocks) if not (folder / block_file(i)).is_file()]
    if missing:
        names = ", ".join(Path(block_file(i)).name for i in missing)
        raise UserError(
            f"{folder} lacks {len(missing)} of {blocks} blocks: {names}; round them with "
            f"`python -m src.adaround_optimize`"
        )


def check_bits_of(path: Path, layers: Mapping[str, RoundedLayer], bits: int) -> None:
    """Raises for codes that are not of these bits: the file of another run, or a damaged one."""
    low, high = code_range(bits)
    for name, layer in layers.items():
        least, most = int(layer.codes.min()), int(layer.codes.max())
        if least < low or most > high:
            raise UserError(
                f"{path}: codes of {name} go from {least} to {most}, at the {bits} bits of the "
                f"other blocks they are {low} to {high}; {HINT}"
            )


def check_config(path: str | Path, config: QuantConfig, model: str, model_hash: str) -> None:
    """Raises for the activation track's choice for another model."""
    wanted = {**config.made_from, "model": model, "model_hash": model_hash}
    require_match(path, config.made_from, wanted, "analyze this model's activations")
