"""What is kept of a set of pictures' features, in one pass; and the same on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..metrics.frechet import Gaussian, Moments
from ..metrics.inception_score import InceptionScore
from ..store import load_npz, save_npz, short_hash
from ..store.arrays import check_expected
from .networks import Features, Identity

SPLITS = 10
SMALL_PART = 1e-4  # of the largest variance, that a sum of roundings may lack of 0
MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")  # the names that other tools give them


@dataclass(frozen=True)
class Known:
    """Mean and covariance of the features of some pictures; spatial ones may not be known."""

    pooled: Moments
    spatial: Moments | None
    count: int | None  # pictures, where the file says so


@dataclass
class Statistics:
    """Grows by every batch of one set of pictures; nothing of a single picture is kept."""

    identity: Identity
    splits: int = SPLITS
    pooled: Gaussian = field(default_factory=Gaussian)
    spatial: Gaussian = field(default_factory=Gaussian)

    def __post_init__(self) -> None:
        self.score = InceptionScore(self.splits)

    @property
    def count(self) -> int:
        return self.pooled.count

    def add(self, features: Features, names: Sequence[str]) -> None:
        """Takes in the features of the pictures of those names."""
        for kind in ("pooled", "spatial", "probabilities"):
            check_finite(getattr(features, kind), names, self.identity.name)
        self.pooled.add(features.pooled)
        self.spatial.add(features.spatial)
        self.score.add(features.probabilities)

    @property
    def known(self) -> Known:
        return Known(self.pooled.moments, self.spatial.moments, self.count)

    def save(self, path: Path) -> Path:
        """As an npz that `load_statistics` reads, and other tools that know mu and sigma."""
        moments = (self.pooled.mean, self.pooled.covariance)
        moments += (self.spatial.mean, self.spatial.covariance)
        digest = np.frombuffer(bytes.fromhex(self.identity.hash), np.uint8)
        save_npz(path, count=self.count, network=digest, **dict(zip(MOMENTS, moments, strict=True)))
        return path


def check_finite(values: np.ndarray, names: Sequence[str], network: str) -> None:
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise UserError(
            f"{network} gives features of {names[int(np.argmax(bad))]} that are not finite; look "
            "at that picture and at the file of weights"
        )


def require_enough(count: int, identity: Identity, whose: str) -> None:
    """Raises where a covariance of so few pictures is bound to be singular."""
    largest = max(identity.pooled, identity.spatial)
    if count <= largest:
        raise UserError(
            f"FID of the {count} pictures of {whose} is undefined: {identity.name} has {largest} "
            f"features, and {count} pictures span {max(0, count - 1)} dimensions of them at most, "
            "so that the covariance is singular and the distance tells how many there are rather "
            f"than how good; give {largest + 1} pictures or more, or --no-fid for all other figures"
        )


def has_score(count: int, splits: int) -> bool:
    """Whether there is an Inception Score: a part with one picture always has 1."""
    return count >= 2 * splits


def score_note(count: int, splits: int, classes: int) -> str | None:
    """What is to be said of the Inception Score of so few pictures."""
    if not has_score(count, splits):
        return (
            f"no Inception Score of {count} pictures: with {splits} parts, some have fewer than 2; "
            "give more pictures, or fewer --splits"
        )
    if count < classes * splits:
        return (
            f"the Inception Score of {count} pictures in {splits} parts is held down by their "
            f"number: parts have fewer pictures than the network has classes, {classes}"
        )
    return None


def distance_note(count: int, reference: int | None) -> str | None:
    """What is to be said of the distance between sets of these numbers of pictures."""
    if reference is None:
        return (
            "FID is only comparable between equal numbers of pictures, and the statistics do not "
            "say of how many they are"
        )
    if count != reference:
        return (
            f"FID is only comparable between equal numbers of pictures, and here {count} are "
            f"compared with {reference}"
        )
    return None


def load_statistics(path: Path, identity: Identity) -> Known:
    """What `Statistics.save` or another tool has written: mu and sigma of the pooled features,
    where they are known mu_s and sigma_s of the spatial ones."""
    arrays = load_npz(path, only={*MOMENTS, "count", "network"})
    size, places = identity.pooled, identity.spatial
    wanted = {"mu": (None, (size,)), "sigma": (None, (size, size))}
    if {"mu_s", "sigma_s"} & set(arrays):
        wanted |= {"mu_s": (None, (places,)), "sigma_s": (None, (places, places))}
    check_network(path, arrays, identity)
    found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    check_expected(path, found, wanted, allow_extra=True)
    for name in wanted:
        check_moment(path, name, arrays[name])
    count = stated_count(path, arrays.get("count"))
    if count is not None:
        require_enough(count, identity, str(path))
    spatial = Moments(arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in wanted else None
    return Known(Moments(arrays["mu"], arrays["sigma"]), spatial, count)


def check_network(path: Path, arrays: dict[str, np.ndarray], identity: Identity) -> None:
    """Raises where the file names another network; other tools' files name none."""
    if "network" in arrays and arrays["network"].tobytes().hex() != identity.hash:
        raise UserError(
            f"{path} is of network {short_hash(arrays['network'].tobytes().hex())}, the features "
            f"here are those of {identity.name} ({short_hash(identity.hash)}); give the same "
            "--inception as for --save-statistics"
        )


def check_moment(path: Path, name: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise UserError(f"{path}: {name} is not finite everywhere; make the file again")
    if values.ndim == 2 and not np.allclose(values, values.T, rtol=1e-3, atol=1e-6):
        raise UserError(f"{path}: {name} is not symmetric, as a covariance is; make it again")
    if values.ndim == 2:
        spectrum = np.linalg.eigvalsh(values)
        if len(spectrum) and spectrum[0] < -SMALL_PART * max(abs(spectrum[-1]), 1e-12):
            raise UserError(
                f"{path}: {name} has negative variances, as no covariance has; make it again"
            )


def stated_count(path: Path, count: np.ndarray | None) -> int | None:
    if count is None:
        return None
    if count.shape != () or count.dtype.kind not in "iu" or count < 1:
        raise UserError(f"{path}: count is no whole number; make the file again")
    return int(count)
