"""The shapes of every transformer that the project knows, by name."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import UserError


@dataclass(frozen=True)
class MMDiTConfig:
    """Shape of one MMDiT. Sizes are counts of channels, blocks, heads or patches."""

    depth: int
    hidden: int
    heads: int
    text_dim: int = 4096
    pooled_dim: int = 2048
    position_size: int = 192  # patches per side of the learned position grid
    latent_channels: int = 16
    patch: int = 2
    mlp_ratio: int = 4
    frequency_dim: int = 256
    qk_norm: bool = False
    dual_attention_blocks: int = 0  # the first N blocks attend a second time within the image
    k_bias: bool = True  # False only for checkpoints that have lost it
    gelu: str = "tanh"  # the published models'; "exact" is DiffusionKit's

    def __post_init__(self) -> None:
        for name in ("depth", "hidden", "heads", "patch", "position_size", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % self.heads:
            raise UserError(f"hidden size {self.hidden} is not a multiple of {self.heads} heads")
        if self.gelu not in ("tanh", "exact"):
            raise UserError(f"unknown gelu {self.gelu!r}; valid: tanh, exact")
        if not 0 <= self.dual_attention_blocks <= self.depth:
            raise UserError(
                f"dual_attention_blocks must be 0 to {self.depth}, got {self.dual_attention_blocks}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MMDiTConfig:
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise UserError(
                f"unknown transformer setting {unknown[0]!r}; valid: {', '.join(sorted(known))}"
            )
        try:
            return cls(**data)
        except TypeError as error:
            raise UserError(f"bad transformer settings: {error}") from None


CONFIGS: dict[str, MMDiTConfig] = {
    "sd3-medium": MMDiTConfig(depth=24, hidden=1536, heads=24),
    "sd3.5-medium": MMDiTConfig(
        depth=24, hidden=1536, heads=24, position_size=384, qk_norm=True, dual_attention_blocks=13
    ),
    "sd3.5-large": MMDiTConfig(depth=38, hidden=2432, heads=38, qk_norm=True),
    "nano": MMDiTConfig(
        depth=8, hidden=192, heads=3, text_dim=128, pooled_dim=128, position_size=8
    ),
    "tiny": MMDiTConfig(depth=2, hidden=64, heads=2, text_dim=32, pooled_dim=32, position_size=8),
    "tiny-3.5-medium": MMDiTConfig(
        depth=3,
        hidden=64,
        heads=2,
        text_dim=32,
        pooled_dim=32,
        position_size=8,
        qk_norm=True,
        dual_attention_blocks=2,
    ),
    "tiny-3.5-large": MMDiTConfig(
        depth=2, hidden=64, heads=2, text_dim=32, pooled_dim=32, position_size=8, qk_norm=True
    ),
}


def config_named(name: str) -> MMDiTConfig:
    """The transformer shape of that name."""
    if name not in CONFIGS:
        raise UserError(f"unknown transformer {name!r}; valid: {', '.join(CONFIGS)}")
    return CONFIGS[name]
