"""Every row in turn, round after round, and what it took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tqdm import tqdm

from ..errors import UserError
from ..sampling import Step
from .drawing import Drawn, Job, draw, one_step
from .rows import Maker, Row, Spec
from .timing import in_turns, refusal_of

Say = Callable[[str], None]


@dataclass(frozen=True)
class Rounds:
    """How often everything is drawn."""

    warm_up: int = 1
    repeats: int = 5

    def __post_init__(self) -> None:
        if self.warm_up < 0:
            raise UserError(f"--warm-up {self.warm_up} is not possible; valid: 0 or more")
        if self.repeats < 1:
            raise UserError(f"--repeats {self.repeats} is not possible; valid: 1 or more")


@dataclass(frozen=True)
class Measured:
    """A row and its batches, one a round."""

    row: Row
    drawn: list[Drawn]


@dataclass
class Benchmark:
    """All that was measured, and why the rest was not."""

    job: Job
    rounds: Rounds
    measured: list[Measured]
    left_out: dict[str, str]
    notes: list[str] = field(default_factory=list)


class Progress:
    """A sampling callback: one bar over the steps of all rows."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def step(self, step: Step) -> None:
        self._bar.update()


def make_rows(maker: Maker, specs: Sequence[Spec], left_out: dict[str, str]) -> list[Row]:
    """Those of which this device computes a step; why it does not the others goes to `left_out`."""
    rows: list[Row] = []
    for spec in specs:
        name = maker.name(spec)
        reason = refusal_of(lambda spec=spec: rows.append(tried(maker, spec)))
        if reason is not None and not rows:
            raise UserError(f"the model in {name} does not run here: {reason}")
        if reason is not None:
            left_out[name] = reason
    return rows


def tried(maker: Maker, spec: Spec) -> Row:
    """The row, after one step of it."""
    row = maker.make(spec)
    one_step(row.pipeline, row.conditioning, maker.job)
    return row


def run(rows: Sequence[Row], job: Job, rounds: Rounds) -> list[Measured]:
    """Draws with every row in every round."""
    total = (rounds.warm_up + rounds.repeats) * len(rows) * job.num_steps
    with tqdm(total=total, desc="drawing", unit="step") as bar:
        progress = [Progress(bar)]
        calls = {
            row.name: partial(draw, row.pipeline, row.conditioning, job, progress) for row in rows
        }
        found = in_turns(calls, rounds.repeats, rounds.warm_up)
    return [Measured(row, found[row.name]) for row in rows]
