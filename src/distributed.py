"""Several processes at one stage, under mlx.launch; a plain run is the only rank of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .store import Manifest, clear_folder, remove_stale_temporaries


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
            mx.eval(mx.distributed.all_sum(mx.ones((1,))))


def open_manifest(
    folder: Path,
    ranks: Ranks,
    *,
    format: str,
    version: int,
    settings: Mapping[str, Any],
    made_from: Mapping[str, Any],
    force: bool,
    own_files: Iterable[str] = (),
) -> Manifest:
    """The manifest of a stage's folder, begun or gone on with; `force` clears the folder first.

    `own_files` are glob patterns of names that are this stage's alone: with `force` they go also
    where a killed run left them in no manifest.
    """
    if ranks.rank == 0:
        if force:
            clear_folder(folder, format)
            for pattern in own_files:
                for path in folder.glob(pattern):
                    path.unlink()
        remove_stale_temporaries(folder)
    ranks.barrier()
    return Manifest.open(
        folder,
        format=format,
        version=version,
        settings=settings,
        made_from=made_from,
        rank=ranks.store_rank,
    )
