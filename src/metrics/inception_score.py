"""Inception Score (Salimans and others, 2016): sure of every picture, of many kinds altogether."""

from __future__ import annotations

import numpy as np

from ..errors import UserError


class InceptionScore:
    """exp of the mean KL divergence of p(class | picture) from p(class), over parts of the
    pictures: they are dealt out in turn, so nothing but sums is kept."""

    def __init__(self, splits: int = 10) -> None:
        if splits < 1:
            raise UserError(f"{splits} splits are not possible; valid: 1 or more")
        self.count = 0
        self._counts = np.zeros(splits)
        self._certainty = np.zeros(splits)  # sums of Σ p log p
        self._sums: np.ndarray | None = None  # (splits, classes)

    def add(self, probabilities: np.ndarray) -> None:
        """Takes in (n, classes) probabilities, of which each row sums to 1."""
        p = np.asarray(probabilities, dtype=np.float64)
        if self._sums is None:
            self._sums = np.zeros((len(self._counts), p.shape[1]))
        split = (self.count + np.arange(len(p))) % len(self._counts)
        np.add.at(self._counts, split, 1)
        np.add.at(self._certainty, split, entropy_terms(p).sum(axis=1))
        np.add.at(self._sums, split, p)
        self.count += len(p)

    @property
    def scores(self) -> np.ndarray:
        """(splits,) from 1 to the number of classes."""
        if self.count < len(self._counts):
            raise UserError(
                f"{len(self._counts)} splits need as many pictures or more, there are {self.count}"
            )
        mean = self._sums / self._counts[:, None]
        return np.exp(self._certainty / self._counts - entropy_terms(mean).sum(axis=1))

    @property
    def mean(self) -> float:
        return float(self.scores.mean())

    @property
    def deviation(self) -> float | None:
        """Of the splits' scores, over n - 1; none where there is one."""
        return float(self.scores.std(ddof=1)) if len(self._counts) > 1 else None


def entropy_terms(p: np.ndarray) -> np.ndarray:
    """p·log p, 0 at 0."""
    return p * np.log(p, out=np.zeros_like(p), where=p > 0)
