"""Whether nano's pictures show what their captions say, by its scorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..metrics.fidelity import bootstrap_interval
from ..models.nano.assembly import PROMPTS
from ..models.nano.captions import parse
from ..models.nano.judge import judge
from ..models.nano.scorer import Scorer
from .networks import Network, ScorerNetwork
from .sources import Batch, Drawing, Folder


@dataclass
class Verdicts:
    """By attribute, and for all of them at once, which pictures are right."""

    scorer: Scorer
    right: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, batch: Batch) -> None:
        pictures = mx.array(batch.pictures) / 255
        for name, right in judge(self.scorer, pictures, parse(batch.prompts)).items():
            self.right.setdefault(name, []).append(right)

    def all(self, name: str) -> np.ndarray:
        return np.concatenate(self.right[name]).astype(float)


def verdicts_of(sources: Sequence[Folder | Drawing], network: Network) -> list[Verdicts | None]:
    """Of each source that shows nano's captions, if its scorer looks at them; of folders only
    where all of them do."""
    if not isinstance(network, ScorerNetwork):
        return [None] * len(sources)
    folders = all(shows_captions(source) for source in sources if isinstance(source, Folder))
    return [
        Verdicts(network.scorer)
        if (folders if isinstance(source, Folder) else shows_captions(source))
        else None
        for source in sources
    ]


def shows_captions(source: Folder | Drawing) -> bool:
    """Whether every picture has one of nano's captions, from its model or from its PNG's texts."""
    if isinstance(source, Drawing):
        return source.pipeline.prompts == PROMPTS
    try:
        return len(parse(sorted(set(source.captions)))) > 0
    except UserError:
        return False


def accuracy_summary(
    found: Verdicts, reference: Verdicts | None, paired: bool
) -> dict[str, dict[str, Any]]:
    """Shares of right pictures by attribute; of pairs also the difference and its interval."""
    table: dict[str, dict[str, Any]] = {}
    for name in found.right:
        values = found.all(name)
        table[name] = {"share": float(values.mean()), "interval": list(bootstrap_interval(values))}
        if reference is None:
            continue
        others = reference.all(name)
        table[name]["against"] = float(others.mean())
        if paired:
            table[name]["difference"] = float((values - others).mean())
            table[name]["difference_interval"] = list(bootstrap_interval(values - others))
    return table
