"""What the tracks write and the loader reads.

quant_config.json   the activation track's choice: bits, scale and shift of every layer and step
quant_config.npz    its long vectors: `PATH.shift` and `PATH.smoothing`, per input channel
weights/mmN.npz     the weight track's block N: `PATH__weight_int`, `PATH__scale`, `PATH__a_scale`,
                    and `PATH__bias`, `PATH__smoothing` where there are such; PATH is a linear path
blocks/mmN.npz      the same before the whole network was refined, where it was
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..store import hash_arrays, hash_file, load_npz, read_json, save_npz, write_json
from .grid import activation_limit, check_bits

QUANT_CONFIG_FORMAT, QUANT_CONFIG_VERSION = "ditq-quant-config", 1
OUTPUT_FORMAT, OUTPUT_VERSION = "ditq-adaround", 1  # of the weight track's folder
ANALYZE_HINT = "make it with `python -m src.analyze_activations`"
VECTORS = ("shift", "smoothing")


@dataclass(frozen=True)
class LayerConfig:
    """How the input of one linear is quantized, at every step key.

    x̂ = clip(round((x − shift) / smoothing / scale), −Q, Q), with Q of the step's bits. With
    `coarse` r above 1 the codes have two regions, one bit of each says which: fine ones in −q … q,
    q = (Q − 1) / 2, and beyond them r times a whole number: 0 … Q for an input that is bounded
    below (`coarse_sides` 1), −q … q otherwise (2).
    """

    bits: list[int]
    scale: list[float]
    shift: np.ndarray | None = None  # per input channel, in the input's unit
    smoothing: np.ndarray | None = None  # per input channel; the weight is multiplied with it
    coarse: int = 1  # steps of the second region over those of the first; 1: there is only one
    coarse_sides: int = 1
    # With smoothing only: the scale for a weight that was not rounded with it.
    plain_scale: list[float] | None = None

    def unsmoothed(self) -> LayerConfig:
        """The same tiers for an input that nothing divides.

        Without a scale that was measured for it the range grows by the widest factor: a value that
        just reached it did so in some channel, which may be that one.
        """
        if self.smoothing is None:
            return self
        widest = float(np.max(self.smoothing))
        scale = self.plain_scale or [scale * widest for scale in self.scale]
        return replace(self, scale=scale, smoothing=None, plain_scale=None)


@dataclass(frozen=True)
class QuantConfig:
    """The tiers, scales and vectors of every quantized layer."""

    made_from: dict[str, Any]  # model, model_hash and hashes of what it was computed from
    step_keys: list[int]  # indices of the sampler steps that were measured
    sigmas: list[float]  # of those steps, falling
    layers: dict[str, LayerConfig]  # by linear path

    def save(self, path: str | Path) -> None:
        """Writes the JSON file, and its vectors in an npz of the same name beside it."""
        path = Path(path)
        self.check(path)
        vectors = self.vectors()
        save_npz(path.with_suffix(".npz"), **vectors)
        write_json(
            path,
            {
                "format": QUANT_CONFIG_FORMAT,
                "version": QUANT_CONFIG_VERSION,
                "made_from": self.made_from,
                "step_keys": self.step_keys,
                "sigmas": self.sigmas,
                "per_timestep": {
                    str(key): {name: self.entry(name, i) for name in self.layers}
                    for i, key in enumerate(self.step_keys)
                },
                "smoothing": {
                    name: f"{name}.smoothing"
                    for name, layer in self.layers.items()
                    if layer.smoothing is not None
                },
                "vectors": {
                    "file": path.with_suffix(".npz").name,
                    "sha256": hash_file(path.with_suffix(".npz")),
                },
                "smoothing_hash": self.smoothing_hash,
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> QuantConfig:
        """Reads both files; a value that cannot be, or vectors of another file, are an error."""
        path = Path(path)
        data = read_json(path, QUANT_CONFIG_FORMAT, QUANT_CONFIG_VERSION, ANALYZE_HINT)
        try:
            vectors = read_vectors(path, data["vectors"])
            per_step = [data["per_timestep"][str(key)] for key in data["step_keys"]]
            layers = {
                name: LayerConfig(
                    bits=[step[name]["bits"] for step in per_step],
                    scale=[step[name]["scale"] for step in per_step],
                    shift=vectors[entry["shift"]] if entry["shift"] else None,
                    smoothing=vectors[data["smoothing"][name]]
                    if name in data["smoothing"]
                    else None,
                    coarse=entry["coarse"],
                    coarse_sides=entry["coarse_sides"],
                    plain_scale=plain_scales(name, per_step),
                )
                for name, entry in same_at_all_steps(path, per_step).items()
            }
            config = cls(data["made_from"], data["step_keys"], data["sigmas"], layers)
            config.check(path)
            recorded = data["smoothing_hash"]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not a whole quantization config ({error!r}); {ANALYZE_HINT}"
            ) from None
        if recorded != config.smoothing_hash:
            raise UserError(
                f"{path} records smoothing {recorded}, its vectors have {config.smoothing_hash}; "
                f"{ANALYZE_HINT}"
            )
        return config

    @property
    def smoothing_hash(self) -> str:
        """sha256 of all smoothing vectors: weights rounded with it may be used with it."""
        return smoothing_hash(
            {n: c.smoothing for n, c in self.layers.items() if c.smoothing is not None}
        )

    def vectors(self) -> dict[str, np.ndarray]:
        """The long vectors by the name that they have in the npz, float32."""
        return {
            f"{name}.{kind}": np.asarray(getattr(layer, kind), dtype=np.float32)
            for name, layer in self.layers.items()
            for kind in VECTORS
            if getattr(layer, kind) is not None
        }

    def entry(self, name: str, index: int) -> dict[str, Any]:
        """What one step's JSON says of one layer; `shift` names a vector."""
        layer = self.layers[name]
        shift = None if layer.shift is None else f"{name}.shift"
        return {
            "bits": layer.bits[index],
            "scale": layer.scale[index],
            "shift": shift,
            "coarse": layer.coarse,
            "coarse_sides": layer.coarse_sides,
            **({} if layer.plain_scale is None else {"plain_scale": layer.plain_scale[index]}),
        }

    def check(self, path: Path) -> None:
        """Raises unless every layer has possible bits and a positive scale at every step key."""
        keys = self.step_keys
        if not keys or len(self.sigmas) != len(keys) or sorted(set(keys)) != list(keys):
            raise UserError(
                f"{path}: step_keys must be rising and as many as sigmas, at least one; "
                f"{ANALYZE_HINT}"
            )
        if not self.layers:
            raise UserError(f"{path} names no layer; {ANALYZE_HINT}")
        for name, layer in self.layers.items():
            if len(layer.bits) != len(keys) or len(layer.scale) != len(keys):
                raise UserError(
                    f"{path}: {name} has {len(layer.bits)} bits and {len(layer.scale)} scales "
                    f"for {len(keys)} steps; {ANALYZE_HINT}"
                )
            if type(layer.coarse) is not int or layer.coarse < 1:
                raise UserError(f"{path}: coarse of {name} is {layer.coarse}; valid: 1 or more")
            if type(layer.coarse_sides) is not int or layer.coarse_sides not in (1, 2):
                raise UserError(
                    f"{path}: coarse_sides of {name} is {layer.coarse_sides}; valid: 1 or 2"
                )
            for bits in layer.bits:
                check_bits(bits, f"{path}: bits of {name}")
            for scale in [*layer.scale, *(layer.plain_scale or [])]:
                if not (math.isfinite(scale) and scale > 0):
                    raise UserError(f"{path}: scale of {name} is {scale}; valid: above 0")
            check_vectors(path, name, layer)

    def at(self, name: str, sigma: float) -> tuple[int, float]:
        """Bits and scale of a layer at any sigma, also of a schedule that was never measured.

        Between two measured sigmas the clipped range is log-linear, and the wider tier holds.
        """
        layer, known = self.layers[name], np.asarray(self.sigmas, dtype=np.float64)
        upper = int(np.searchsorted(-known, -sigma, side="right")) - 1  # the last with σ_i ≥ σ
        low = min(max(upper, 0), len(known) - 1)
        high = min(low + 1, len(known) - 1) if upper >= 0 else low
        if low == high or math.isclose(known[low], sigma, rel_tol=1e-6):
            return layer.bits[low], layer.scale[low]
        if math.isclose(known[high], sigma, rel_tol=1e-6):
            return layer.bits[high], layer.scale[high]
        part = log_fraction(sigma, known[low], known[high])
        ranges = [layer.scale[i] * activation_limit(layer.bits[i]) for i in (low, high)]
        bits = max(layer.bits[low], layer.bits[high])
        range_here = math.exp((1 - part) * math.log(ranges[0]) + part * math.log(ranges[1]))
        return bits, range_here / activation_limit(bits)


def same_at_all_steps(path: Path, per_step: list[dict[str, Any]]) -> dict[str, Any]:
    """What each layer has at its first step, and has to have at all others."""
    first = per_step[0] if per_step else {}
    for name, entry in first.items():
        for key in ("shift", "coarse", "coarse_sides"):
            if any(step[name][key] != entry[key] for step in per_step):
                raise UserError(
                    f"{path}: {key} of {name} differs between steps; valid: one for all; "
                    f"{ANALYZE_HINT}"
                )
    return first


def plain_scales(name: str, per_step: list[dict[str, Any]]) -> list[float] | None:
    """One layer's scales without its smoothing, where the config has them."""
    if "plain_scale" not in per_step[0][name]:
        return None
    return [step[name]["plain_scale"] for step in per_step]


def log_fraction(sigma: float, above: float, below: float) -> float:
    """How far sigma has come from `above` to `below`, on a log axis where both allow it."""
    if below <= 0 or sigma <= 0:
        return (above - sigma) / (above - below)
    return math.log(above / sigma) / math.log(above / below)


def smoothing_hash(vectors: Mapping[str, np.ndarray]) -> str:
    """sha256 over smoothing vectors by linear path, as float32."""
    return hash_arrays({n: np.asarray(v, dtype=np.float32) for n, v in vectors.items()})


def read_vectors(path: Path, described: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The npz beside a config, which must be the very one that the config was written with."""
    file = path.with_suffix(".npz")
    found = hash_file(file, ANALYZE_HINT)
    if found != described["sha256"]:
        raise UserError(
            f"{file} has sha256 {found[:16]}, {path.name} was written with one of "
            f"{str(described['sha256'])[:16]}; {ANALYZE_HINT}"
        )
    return load_npz(file, finite=True)


def check_vectors(path: Path, name: str, layer: LayerConfig) -> None:
    for kind in VECTORS:
        vector = getattr(layer, kind)
        if vector is None:
            continue
        if np.ndim(vector) != 1 or not np.all(np.isfinite(vector)):
            raise UserError(f"{path}: {kind} of {name} must be a finite vector; {ANALYZE_HINT}")
        if kind == "smoothing" and not np.all(vector > 0):
            raise UserError(f"{path}: smoothing of {name} must be above 0; {ANALYZE_HINT}")


@dataclass(frozen=True)
class RoundedLayer:
    """One linear after the weight track: W·diag(smoothing) ≈ scale·codes."""

    codes: np.ndarray  # (rows, columns) int8
    scale: np.ndarray  # (rows, groups) float32
    a_scale: np.ndarray  # (step keys,) float32, of the smoothed and shifted input
    bias: np.ndarray | None = None  # to be used in the place of the model's, float32
    smoothing: np.ndarray | None = None  # that the weight was multiplied with before rounding


# Field of a layer: its suffix in the file, its dtype and how many dimensions it has.
LAYER_ARRAYS = {
    "codes": ("weight_int", "int8", 2),
    "scale": ("scale", "float32", 2),
    "a_scale": ("a_scale", "float32", 1),
    "bias": ("bias", "float32", 1),
    "smoothing": ("smoothing", "float32", 1),
}


FINAL, BEFORE_REFINING = "weights", "blocks"


def block_file(index: int, part: str = FINAL) -> str:
    """Name of a block's weights, relative to the output folder."""
    return f"{part}/mm{index}.npz"


def save_rounded_block(
    folder: Path, index: int, layers: Mapping[str, RoundedLayer], part: str = FINAL
) -> None:
    """Writes one block; layers are by linear path."""
    arrays = {}
    for path, layer in layers.items():
        for field, (suffix, dtype, _) in LAYER_ARRAYS.items():
            value = getattr(layer, field)
            if value is not None:
                arrays[f"{path}__{suffix}"] = np.asarray(value).astype(dtype, casting="same_kind")
    save_npz(folder / block_file(index, part), **arrays)


def load_rounded_block(folder: Path, index: int, part: str = FINAL) -> dict[str, RoundedLayer]:
    """Reads one block back; an array that is missing, odd or not finite is an error."""
    path, hint = folder / block_file(index, part), "run `python -m src.adaround_optimize` first"
    arrays = load_npz(path, finite=True, hint=hint)
    found: dict[str, dict[str, np.ndarray]] = {}
    fields = {suffix: (field, *rest) for field, (suffix, *rest) in LAYER_ARRAYS.items()}
    for name, array in arrays.items():
        linear, _, suffix = name.rpartition("__")
        if not linear or suffix not in fields:
            raise UserError(f"{path} holds an unknown array {name!r}; {hint}")
        field, dtype, dimensions = fields[suffix]
        if array.dtype.name != dtype or array.ndim != dimensions:
            raise UserError(
                f"{path}: array {name!r} is {array.dtype.name} with {array.ndim} dimensions, "
                f"expected {dtype} with {dimensions}; {hint}"
            )
        found.setdefault(linear, {})[field] = array
    for linear, present in found.items():
        if missing := {"codes", "scale", "a_scale"} - present.keys():
            suffix = LAYER_ARRAYS[min(missing)][0]
            raise UserError(f"{path} has no array {linear + '__' + suffix!r}; {hint}")
    return {linear: RoundedLayer(**present) for linear, present in found.items()}
