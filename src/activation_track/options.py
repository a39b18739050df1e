"""What can be asked of analyze_activations: the settings, their checks, the thresholds' options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import click

from ..errors import UserError
from ..quant.tiers import Thresholds, check_average, check_tiers

POLICIES = ("thresholds", "error")
SMOOTHINGS = ("foldable", "all", "spikes", "none")
TWO_REGIONS = ("auto", "post-gelu", "all", "none")
AVERAGE_BITS = 6.0


@dataclass(frozen=True)
class Options:
    """The settings of one analysis; what cannot be is refused when they are made."""

    policy: str = POLICIES[0]
    tiers: Sequence[int] = (4, 6, 8)
    segments: int = 3
    samples: int = 4
    smooth: str = SMOOTHINGS[0]
    two_regions: str = TWO_REGIONS[0]
    average_bits: float | None = None
    min_sqnr: float | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("policy", self.policy, POLICIES),
            ("smooth", self.smooth, SMOOTHINGS),
            ("two-regions", self.two_regions, TWO_REGIONS),
        ):
            if value not in valid:
                raise UserError(f"unknown --{name} {value!r}; valid: {', '.join(valid)}")
        if self.segments < 1 or self.samples < 1:
            raise UserError(
                f"--segments {self.segments} and --samples {self.samples} must be at least 1"
            )
        object.__setattr__(self, "tiers", check_tiers(self.tiers))
        check_average(self.budget, self.tiers)

    @property
    def budget(self) -> float:
        """Average bits that the error policy may spend."""
        return max(AVERAGE_BITS, self.tiers[0]) if self.average_bits is None else self.average_bits


def parse_tiers(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--tiers {text!r} is not a list of bits; valid: such as 4,6,8") from None


def policy_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How tiers are chosen, scales laid out and inputs smoothed."""
    added = (
        click.option("--policy", default=POLICIES[0], help=f"For tiers: {' or '.join(POLICIES)}."),
        click.option("--tiers", default="4,6,8", callback=parse_tiers, help="Bits to choose from."),
        click.option(
            "--segments", default=3, help="Scales that a layer may have over the steps of a tier."
        ),
        click.option(
            "--smooth",
            default=SMOOTHINGS[0],
            help=f"Inputs to smooth: {', '.join(SMOOTHINGS)}; foldable are all but fc2's.",
        ),
        click.option(
            "--two-regions",
            default=TWO_REGIONS[0],
            help="Inputs whose codes may be fine near 0 and coarse beyond: "
            f"{', '.join(TWO_REGIONS)}; auto is behind GELU, and elsewhere where codes fit into "
            "a byte.",
        ),
        click.option(
            "--samples", default=4, help="Stored steps on which the velocity's error is measured."
        ),
        click.option(
            "--average-bits", type=float, help="Error policy: bits to spend.  [default: 6]"
        ),
        click.option(
            "--min-sqnr", type=float, help="Error policy: dB to reach, instead.  [default: none]"
        ),
    )
    for option in reversed(added):
        function = option(function)
    return function


def threshold_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """One option for every number of the published rule."""
    for found in reversed(fields(Thresholds)):
        name = f"--{found.name.replace('_', '-')}"
        text = f"Thresholds: {found.metadata['help']}."
        function = click.option(name, default=found.default, help=text)(function)
    return function
