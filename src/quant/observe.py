"""What the inputs of a block's linears are like: XᵀX, means, largest values per step."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from .standin import BlockData, StandInBlock


@dataclass
class InputStatistics:
    """Of one linear's input, after shift and smoothing."""

    hessian: mx.array | int = 0  # XᵀX over all tokens
    total: mx.array | int = 0  # per channel
    tokens: int = 0
    row_absmax: list[mx.array] = field(default_factory=list)  # one value per row of the data

    def add(self, x: mx.array) -> None:
        flat = x.reshape(-1, x.shape[-1])
        self.hessian = self.hessian + flat.T @ flat
        self.total = self.total + flat.sum(axis=0)
        self.tokens += len(flat)
        self.row_absmax.append(mx.abs(x).max(axis=(1, 2)))

    def arrays(self) -> list[mx.array]:
        return [self.hessian, self.total, *self.row_absmax]

    @property
    def mean(self) -> mx.array:
        return self.total / self.tokens

    def absmax_per_step(self, step: mx.array, steps: int) -> mx.array:
        """(steps,) the largest absolute value at each step key."""
        values = mx.concatenate(self.row_absmax)
        return mx.stack([mx.where(step == i, values, 0).max() for i in range(steps)])


def input_statistics(
    block: StandInBlock, data: BlockData, batch_size: int
) -> dict[str, InputStatistics]:
    """By path, in one pass over the data; linears that read the same input share one."""
    shared: dict[str, InputStatistics] = {}
    own = {path: InputStatistics() for path in block.stand_ins}
    last: list[tuple[mx.array, InputStatistics]] = []

    def watcher(path: str):
        def watch(x: mx.array) -> mx.array:
            for known, statistics in last:
                if known is x:
                    shared[path] = statistics
                    return x
            own[path].add(x)
            last.append((x, own[path]))
            return x

        return watch

    block.set_hooks({path: watcher(path) for path in block.stand_ins})
    try:
        for chunk in data.chunks(batch_size):
            last.clear()
            block(chunk)
            mx.eval([statistics.arrays() for statistics in own.values() if statistics.tokens])
    finally:
        block.clear_hooks()
    return own | shared
