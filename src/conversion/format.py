"""What a converted file holds.

A converted layer X is two tensors: `X.weight`, int8 codes of the weight's own shape (rows, K), and
`X.weight_scale`, float32 of shape (rows, blocks), where a block is K / blocks neighbouring columns:

    weight[n, k] = scale[n, k // (K / blocks)] * code[n, k]        codes are -127 … 127

Everything else stands under its own name with the bytes it had. The file's metadata keeps what the
source had and adds `METADATA_KEY`, the scheme as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..models.checkpoints import CODES_SCALE

METADATA_KEY = "ditq"
FORMAT, VERSION = "ditq-int8", 1
WEIGHT, SCALE = ".weight", CODES_SCALE
BLOCKWISE, PER_CHANNEL = "blockwise", "per-channel"
SCHEMES = (BLOCKWISE, PER_CHANNEL)
BLOCK_SIZES = (32, 64, 128)
BLOCK_SIZE = 128

# How others mark quantized layers: ours, MLX's, bitsandbytes', comfy's and compressed-tensors'.
FOREIGN = (SCALE, ".scales", ".SCB", ".scale_weight", ".weight_packed", ".weight_scale_inv")
CODES = ("int8", "uint8", "uint32")


@dataclass(frozen=True)
class Scheme:
    """How many columns share a scale: `block_size` of them, or all of a row."""

    name: str = BLOCKWISE
    block_size: int = BLOCK_SIZE

    def check(self) -> None:
        if self.name not in SCHEMES:
            raise UserError(f"unknown scheme {self.name!r}; valid: {', '.join(SCHEMES)}")
        if self.block_size not in BLOCK_SIZES:
            valid = ", ".join(map(str, BLOCK_SIZES))
            raise UserError(f"block size {self.block_size} is not possible; valid: {valid}")

    def fits(self, columns: int) -> bool:
        return self.name == PER_CHANNEL or columns % self.block_size == 0

    def blocks(self, columns: int) -> int:
        """Scales of a row."""
        return columns // self.block_size if self.name == BLOCKWISE else 1

    def metadata(self) -> str:
        data: dict[str, object] = {"format": FORMAT, "version": VERSION, "scheme": self.name}
        if self.name == BLOCKWISE:
            data["block_size"] = self.block_size
        return json.dumps(data, separators=(",", ":"))


def scheme_of(metadata: Mapping[str, str], path: str | Path) -> Scheme | None:
    """The scheme of a converted file, from its metadata; None for a file of another kind."""
    if METADATA_KEY not in metadata:
        return None
    try:
        data = json.loads(metadata[METADATA_KEY])
        known = data["format"] == FORMAT and data["version"] == VERSION
        scheme = Scheme(data["scheme"], data.get("block_size", BLOCK_SIZE))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        known = False
    if not known:
        raise UserError(
            f"{path} says under {METADATA_KEY!r} that it is of a format this program does not "
            f"read; it reads {FORMAT} version {VERSION}: convert the 16-bit checkpoint again"
        )
    scheme.check()
    return scheme


def quantized_tensor(dtypes: Mapping[str, str], names: Iterable[str]) -> str | None:
    """The first tensor that shows that a file is quantized already; `dtypes` are by name."""
    for name in names:
        if name.endswith(FOREIGN) or (name.endswith(WEIGHT) and dtypes[name] in CODES):
            return name
    return None
