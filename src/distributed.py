"""Several processes at one stage, under mlx.launch; a plain run is the only rank of one."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is."""

    rank: int
    size: int

    @classmethod
    def here(cls) -> Ranks:
        group = mx.distributed.init()
        return cls(group.rank(), group.size())

    @property
    def store_rank(self) -> int | None:
        """For `store`, to which a plain run has no rank."""
        return self.rank if self.size > 1 else None

    def barrier(self) -> None:
        """Waits until every rank has come here."""
        if self.size > 1:
            mx.eval(mx.distributed.all_sum(mx.ones((1,)), stream=mx.cpu))
