"""What stands in for a linear while its block or network is rounded, and the block run with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

Weights = Mapping[str, mx.array]  # by path
SMALLEST_POWER = 1e-12  # of a channel that is always zero
Streams = tuple[mx.array, mx.array | None]  # image and text; the last block gives no text


class StandIn(nn.Module):
    """A linear whose weight is float32 and may be exchanged, and whose input may be changed.

    The input is shifted and smoothed first: `weight` and `bias` are those for such an input.
    """

    def __init__(
        self,
        weight: mx.array,
        bias: mx.array | None,
        shift: mx.array | None = None,
        smoothing: mx.array | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        if bias is not None:
            self.bias = bias
        if shift is not None:
            self.shift = shift
        if smoothing is not None:
            self.smoothing = smoothing
        self._on_input: Callable[[mx.array], mx.array] | None = None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, shift: mx.array | None = None, smoothing: mx.array | None = None
    ) -> StandIn:
        """Smoothing m turns W into W·diag(m); the shift z leaves W z in the bias."""
        weight = linear.weight.astype(mx.float32)
        bias = linear.bias.astype(mx.float32) if "bias" in linear else None
        if shift is not None:
            offset = weight @ shift
            bias = offset if bias is None else bias + offset
        if smoothing is not None:
            weight = weight * smoothing
        return cls(weight, bias, shift, smoothing)

    def __call__(self, x: mx.array) -> mx.array:
        if "shift" in self:
            x = x - self.shift
        if "smoothing" in self:
            x = x / self.smoothing
        if self._on_input is not None:
            x = self._on_input(x)
        if "bias" in self:
            return mx.addmm(self.bias, x, self.weight.T)
        return x @ self.weight.T


@dataclass(frozen=True)
class BlockData:
    """What enters a block and what the 16-bit block made of it, row by row, in any float dtype."""

    image: mx.array
    text: mx.array
    conditioning: mx.array
    step: mx.array  # per row, the place of its step among the step keys
    target_image: mx.array
    target_text: mx.array | None = None

    def __len__(self) -> int:
        return len(self.image)

    def rows(self, index: mx.array | slice) -> BlockData:
        """Some rows, in float32."""
        text = None if self.target_text is None else self.target_text[index].astype(mx.float32)
        return BlockData(
            self.image[index].astype(mx.float32),
            self.text[index].astype(mx.float32),
            self.conditioning[index].astype(mx.float32),
            self.step[index],
            self.target_image[index].astype(mx.float32),
            text,
        )

    def spaced(self, count: int) -> BlockData:
        """About that many rows, evenly spaced."""
        return self.rows(slice(0, len(self), max(1, len(self) // count)))

    def chunks(self, size: int) -> Iterator[BlockData]:
        """All rows in order, some at a time."""
        for start in range(0, len(self), size):
            yield self.rows(slice(start, start + size))

    def arrays(self) -> dict[str, mx.array]:
        """As a tree that a compiled function takes; `BlockData(**arrays)` undoes it."""
        named = {name: getattr(self, name) for name in ("image", "text", "conditioning", "step")}
        named["target_image"] = self.target_image
        return named if self.target_text is None else named | {"target_text": self.target_text}

    @property
    def inputs(self) -> tuple[mx.array, mx.array, mx.array]:
        return self.image, self.text, self.conditioning

    @property
    def targets(self) -> Streams:
        return self.target_image, self.target_text


@dataclass
class StandIns:
    """A float32 module with stand-ins in the place of its linears, by path."""

    module: nn.Module
    stand_ins: dict[str, StandIn]

    def set_weights(self, weights: Weights) -> None:
        for path, weight in weights.items():
            self.stand_ins[path].weight = weight

    def masters(self) -> dict[str, mx.array]:
        """The weights that are set now."""
        return {path: stand_in.weight for path, stand_in in self.stand_ins.items()}

    def biases(self) -> dict[str, mx.array | None]:
        return {path: stand_in.get("bias") for path, stand_in in self.stand_ins.items()}

    def set_biases(self, biases: Mapping[str, mx.array | None]) -> None:
        """None takes a bias away."""
        for path, bias in biases.items():
            if bias is None:
                self.stand_ins[path].pop("bias", None)
            else:
                self.stand_ins[path].bias = bias

    def add_biases(self, corrections: Mapping[str, mx.array]) -> None:
        for path, correction in corrections.items():
            bias = self.stand_ins[path].get("bias")
            self.stand_ins[path].bias = correction if bias is None else bias + correction

    def set_hooks(self, hooks: Mapping[str, Callable[[mx.array], mx.array] | None]) -> None:
        for path, hook in hooks.items():
            self.stand_ins[path]._on_input = hook

    def clear_hooks(self) -> None:
        self.set_hooks(dict.fromkeys(self.stand_ins))


class StandInBlock(StandIns):
    """One block; paths are within it."""

    def __call__(self, data: BlockData) -> Streams:
        return self.module(*data.inputs)


Power = list[mx.array]  # per stream that the block gives, (hidden,)


def channel_power(data: BlockData, batch_size: int) -> Power:
    """Mean square of every channel of what the block gives, over all rows."""
    totals: Power = []
    for chunk in data.chunks(batch_size):
        sums = [mx.square(t).mean(axis=1).sum(axis=0) for t in chunk.targets if t is not None]
        totals = [t + s for t, s in zip(totals, sums, strict=True)] if totals else sums
        mx.eval(totals)
    return [mx.maximum(total / len(data), SMALLEST_POWER) for total in totals]


def stream_errors(outputs: Streams, targets: Streams, power: Power) -> list[mx.array]:
    """Squared error of each stream, every channel relative to its own power, mean over channels.

    Without that the few channels of huge power would decide alone, and the layers that read the
    stream hardly look at those.
    """
    pairs = [(o, t) for o, t in zip(outputs, targets, strict=True) if t is not None]
    return [
        mx.mean(mx.square(output - target) / own)
        for (output, target), own in zip(pairs, power, strict=True)
    ]
