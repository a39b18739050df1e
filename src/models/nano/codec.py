"""nano's picture codec: 8x smaller on each side, 16 channels, as Stable Diffusion 3's VAE."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

NORM_GROUPS = 8


@dataclass(frozen=True)
class CodecConfig:
    """Channels at a quarter and at an eighth of the picture's side, and residual blocks there."""

    quarter: int = 72
    eighth: int = 128
    quarter_blocks: int = 2
    eighth_blocks: int = 1
    latent_channels: int = 16
    edge: int = 16  # channels at full resolution, in the last two convolutions


def space_to_depth(x: mx.array, side: int) -> mx.array:
    """(batch, h, w, c) to (batch, h / side, w / side, side² c)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).flatten(3)


def depth_to_space(x: mx.array, side: int) -> mx.array:
    """The inverse of `space_to_depth`."""
    batch, height, width, _ = x.shape
    x = x.reshape(batch, height, width, side, side, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * side, width * side, -1)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NORM_GROUPS, channels, pytorch_compatible=True)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, channels, pytorch_compatible=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        hidden = self.conv1(nn.silu(self.norm1(x)))
        return x + self.conv2(nn.silu(self.norm2(hidden)))


class Encoder(nn.Module):
    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.entry = nn.Conv2d(48, config.quarter, 3, padding=1)
        self.quarter = [ResidualBlock(config.quarter) for _ in range(config.quarter_blocks)]
        self.down = nn.Conv2d(config.quarter, config.eighth, 4, stride=2, padding=1)
        self.eighth = [ResidualBlock(config.eighth) for _ in range(config.eighth_blocks)]
        self.exit = nn.Conv2d(config.eighth, config.latent_channels, 1)

    def __call__(self, picture: mx.array) -> mx.array:
        x = self.entry(space_to_depth(2 * picture - 1, 4))
        for block in self.quarter:
            x = block(x)
        x = self.down(x)
        for block in self.eighth:
            x = block(x)
        return self.exit(nn.silu(x))


class Decoder(nn.Module):
    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.entry = nn.Conv2d(config.latent_channels, config.eighth, 3, padding=1)
        self.eighth = [ResidualBlock(config.eighth) for _ in range(config.eighth_blocks)]
        self.up = nn.Conv2d(config.eighth, 4 * config.quarter, 1)
        self.quarter = [ResidualBlock(config.quarter) for _ in range(config.quarter_blocks + 1)]
        self.spread = nn.Conv2d(config.quarter, 16 * config.edge, 1)
        self.edge = nn.Conv2d(config.edge, config.edge, 3, padding=1)
        self.exit = nn.Conv2d(config.edge, 3, 3, padding=1)

    def __call__(self, latent: mx.array) -> mx.array:
        x = self.entry(latent)
        for block in self.eighth:
            x = block(x)
        x = depth_to_space(self.up(x), 2)
        for block in self.quarter:
            x = block(x)
        x = depth_to_space(self.spread(nn.silu(x)), 4)
        x = self.exit(nn.silu(self.edge(nn.silu(x))))
        return (x + 1) / 2


class Codec(nn.Module):
    """Pictures (batch, height, width, 3) in 0…1 to latents (batch, height/8, width/8, 16) and back.

    Latents that leave have mean 0 and deviation 1 in every channel: `mean` and `std` are measured
    once after training.
    """

    side = 8  # pixels of a picture to one of the latent

    def __init__(self, config: CodecConfig | None = None) -> None:
        super().__init__()
        config = config or CodecConfig()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.mean = mx.zeros((config.latent_channels,))
        self.std = mx.ones((config.latent_channels,))

    def encode(self, picture: mx.array) -> mx.array:
        return (self.encoder(picture) - self.mean) / self.std

    def check(self) -> None:
        """Its weights are there already."""

    def decode(self, latent: mx.array) -> mx.array:
        """Not clipped: values a little outside 0…1 occur."""
        return self.decoder(latent * self.std + self.mean)
