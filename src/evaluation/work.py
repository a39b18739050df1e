"""One pass over both sets of pictures, in batches: everything is measured as they go by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from ..errors import UserError
from .accuracy import Verdicts, verdicts_of
from .networks import Network
from .paired import TRAIL, Pairs, Velocities, check_sizes, pairs_up, same_model
from .sources import Batch, Drawing, Folder
from .statistics import (
    SPLITS,
    Known,
    Statistics,
    distance_note,
    require_enough,
    score_note,
)

Source = Folder | Drawing


@dataclass(frozen=True)
class Settings:
    """How it is measured, named as on the command line."""

    fid: bool = True
    paired: bool = True
    splits: int | None = None  # of the Inception Score; none: 10, or one a picture
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size} is not possible; valid: 1 or more")


@dataclass
class Side:
    """One of the two sets, and what is known of it."""

    source: Source
    statistics: Statistics
    verdicts: Verdicts | None

    def take(self, batch: Batch, network: Network) -> None:
        self.statistics.add(network(batch.pictures), batch.names)
        if self.verdicts is not None:
            self.verdicts.add(batch)


@dataclass
class Evaluation:
    """All that was measured."""

    found: Side
    against: Side | Known | None
    settings: Settings
    pairs: Pairs | None = None
    velocities: Velocities | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def other(self) -> Known | None:
        """What the distances are measured to."""
        return self.against.statistics.known if isinstance(self.against, Side) else self.against


def prepare(
    found: Source, against: Source | Known | None, network: Network, settings: Settings, saves: bool
) -> Evaluation:
    """Raises for whatever cannot be measured, before the first picture is drawn or read."""
    sources = [source for source in (found, against) if isinstance(source, (Folder, Drawing))]
    for source in sources:
        network.check(*source.size)
    needs = [found] if saves else []
    if settings.fid and against is not None:
        needs = sources
    for source in needs:
        require_enough(len(source.names), network.identity, source.title)
    if isinstance(against, Known) and not settings.fid:
        raise UserError("--no-fid leaves nothing to do with statistics; leave one of them out")
    verdicts = verdicts_of(sources, network)
    sides = [
        side_of(source, network, settings, verdict)
        for source, verdict in zip(sources, verdicts, strict=True)
    ]
    other = sides[1] if len(sides) == 2 else against
    evaluation = Evaluation(sides[0], other, settings)
    if isinstance(against, (Folder, Drawing)) and settings.paired:
        pair_up(evaluation, against, found)
    if isinstance(against, Known) and against.spatial is None:
        evaluation.notes.append("no sFID: the statistics have no mu_s and sigma_s")
    evaluation.notes += number_notes(evaluation, sides)
    return evaluation


def number_notes(evaluation: Evaluation, sides: Sequence[Side]) -> list[str]:
    """What is to be said of the numbers of pictures, each but once."""
    notes = []
    if evaluation.settings.fid and evaluation.against is not None:
        against = evaluation.against
        reference = against.count if isinstance(against, Known) else len(against.source.names)
        notes.append(distance_note(len(sides[0].source.names), reference))
    for side in sides:
        statistics = side.statistics
        classes = statistics.identity.classes
        notes.append(score_note(len(side.source.names), statistics.splits, classes))
    return list(dict.fromkeys(note for note in notes if note is not None))


def side_of(
    source: Source, network: Network, settings: Settings, verdicts: Verdicts | None
) -> Side:
    splits = min(SPLITS, len(source.names)) if settings.splits is None else settings.splits
    if splits > len(source.names):
        raise UserError(
            f"--splits {splits} is more than the {len(source.names)} pictures of {source.title}; "
            f"valid: 1 to {len(source.names)}"
        )
    statistics = Statistics(network.identity, splits)
    return Side(source, statistics, verdicts)


def pair_up(evaluation: Evaluation, reference: Source, found: Source) -> None:
    """Adds what pairs are measured by, or a note that says why there are none."""
    if (reason := pairs_up(reference, found)) is not None:
        evaluation.notes.append(f"nothing is compared picture by picture: {reason}")
        return
    check_sizes(reference, found)
    evaluation.pairs = Pairs()
    if same_model(reference, found):
        evaluation.velocities = Velocities(reference, found.pipeline)


def run(evaluation: Evaluation, network: Network) -> None:
    """Looks at all pictures, of pairs at both in turn."""
    sides = [evaluation.found]
    if isinstance(evaluation.against, Side):
        sides.append(evaluation.against)
    total = sum(len(side.source.names) for side in sides)
    with tqdm(total=total, desc="pictures", unit="picture") as bar:
        if evaluation.pairs is not None:
            run_pairs(evaluation, network, bar)
            return
        for side in sides:
            for batch in side.source.batches(evaluation.settings.batch_size):
                side.take(batch, network)
                bar.update(len(batch.names))


def run_pairs(evaluation: Evaluation, network: Network, bar: tqdm) -> None:
    """The reference's batch, then the other's, which is compared with it."""
    found, against = evaluation.found, evaluation.against
    trail = 0 if evaluation.velocities is None else TRAIL
    for reference, batch in both(against.source, found.source, evaluation.settings, trail):
        against.take(reference, network)
        found.take(batch, network)
        evaluation.pairs.add(reference, batch, latents=evaluation.velocities is not None)
        if evaluation.velocities is not None:
            evaluation.velocities.add(reference)
        bar.update(2 * len(batch.names))


def both(
    reference: Source, found: Source, settings: Settings, trail: int
) -> Iterator[tuple[Batch, Batch]]:
    size = settings.batch_size
    return zip(reference.batches(size, trail), found.batches(size), strict=True)
