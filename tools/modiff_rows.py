"""The rows of MoDiff's benchmark, how they are shown, and what was to be reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from src.errors import UserError

import numpy as np

EXACT, OTHER = "full precision", "full precision, other noise"
PICTURE_SEED, OTHER_SEED = 100_000, 900_000
SIXTEEN, STATIC, DYNAMIC, RANGE, GUIDANCE = 16, "static", "tensor", "range", "guidance"
SCALES = {
    STATIC: "static",
    DYNAMIC: "dynamic",
    RANGE: "each token's range",
    GUIDANCE: "guidance",
}


@dataclass(frozen=True)
class Row:
    """One way of running nano."""

    weight_bit: int = SIXTEEN
    act_bit: int = SIXTEEN
    modulate: str | None = None
    scale: str = STATIC
    seed: int = PICTURE_SEED
    rest_bit: int | None = None  # of layers that auto leaves; none: act_bit

    @property
    def name(self) -> str:
        if (self.weight_bit, self.act_bit) == (SIXTEEN, SIXTEEN):
            return EXACT if self.seed == PICTURE_SEED else OTHER
        name = f"W{self.weight_bit}A{self.act_bit}"
        if self.act_bit == SIXTEEN:
            return name
        how = {None: "plain", "all": "MoDiff", "auto": "MoDiff auto, a quarter"}[self.modulate]
        how += "" if self.rest_bit is None else f", rest A{self.rest_bit}"
        return f"{name} {how} {SCALES[self.scale]}"

    @property
    def folder(self) -> str:
        return self.name.replace(",", "").replace(" ", "_")

    @property
    def own_floats(self) -> Row:
        """The row of the same weights, with inputs in floats."""
        return Row(self.weight_bit)


def all_rows() -> list[Row]:
    """The table's, in its order."""
    rows = [Row(), Row(seed=OTHER_SEED)]
    for weight, bits in ((8, (8, 6, 4, 3)), (4, (8, 4)), (SIXTEEN, (8, 6, 4, 3))):
        rows += [Row(weight)] if weight != SIXTEEN else []
        scales = (STATIC, DYNAMIC) if weight != SIXTEEN else (DYNAMIC,)
        rows += [
            Row(weight, act, how, scale)
            for act in bits
            for scale in scales
            for how in (None, "all")
        ]
    rows += [Row(8, bits, None, scale) for scale in (RANGE, GUIDANCE) for bits in (8, 6, 4)]
    rows += [Row(8, bits, "all", GUIDANCE) for bits in (8, 6, 4, 3)]
    rows += [Row(4, bits, "all", GUIDANCE) for bits in (8, 4)]
    rows += [Row(8, 8, "auto", scale) for scale in (STATIC, DYNAMIC)]
    rows += [Row(8, bits, "auto", DYNAMIC, rest_bit=rest) for bits in (6, 4) for rest in (None, 8)]
    return rows


# Weights and inputs; a row is compared with that of its own weights and inputs in floats.
PRIORITY = ((8, SIXTEEN), (8, 8), (4, SIXTEEN), (4, 8), (8, 6), (8, 4), (4, 4), (8, 3))


def by_priority(rows: list[Row]) -> list[Row]:
    """In the order in which they are drawn: what others are compared with comes first, then what
    the goals ask for most."""
    first = {pair: place for place, pair in enumerate(((SIXTEEN, SIXTEEN), *PRIORITY))}

    def place(row: Row) -> tuple[bool, int]:
        return row.modulate == "auto", first.get((row.weight_bit, row.act_bit), len(first))

    return sorted(rows, key=place)


def chosen_rows(patterns: str | None) -> list[Row]:
    """Rows of which any of the patterns, separated by semicolons, describes a part."""
    rows = all_rows()
    if patterns is None:
        return rows
    wanted = [pattern.strip() for pattern in patterns.split(";")]
    found = [r for r in rows if any(fnmatchcase(r.name, f"*{pattern}*") for pattern in wanted)]
    if not found:
        names = "; ".join(row.name for row in rows)
        raise UserError(f"--rows {patterns!r} matches none of: {names}")
    return found


HEAD = [
    "| | pictures | latent, dB: mean (interval) | median | worst | to its own weights in floats, "
    "dB | FID | sFID | Inception Score | to full precision |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
]


def drawn_where(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a table of rows says of the machines that drew them, and which are not in it yet."""
    machines = [row["measured"] for row in rows.values()]
    if not machines:
        return ["No row is drawn yet."]
    kinds = sorted({(m["device"], m["mlx"]) for m in machines})
    days = sorted({m["date"] for m in machines})
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    lines = [f"Drawn on {', '.join(f'{d} with MLX {mlx}' for d, mlx in kinds)}, {when}."]
    missing = [row.name for row in all_rows() if row.name not in rows]
    return [*lines, *([f"Not drawn yet: {', '.join(missing)}."] if missing else [])]


def line(name: str, row: dict[str, Any]) -> str:
    latent, own = row["latent"], row["latent_own_weights"]
    pictures = row["pictures"]
    cells = [name, f"{pictures:,}", "", "", "", "" if own is None else f"{own['mean']:.1f}"]
    if latent is not None:
        low, high = latent["interval"]
        cells[2] = f"{latent['mean']:.1f} ({low:.1f} to {high:.1f})"
        cells[3], cells[4] = f"{latent['median']:.1f}", f"{latent['worst']:.1f}"
    sets = row["at"].get(str(pictures), {})
    for key in ("fid", "sfid"):
        cells.append(distance(sets, key))
    score = sets.get("inception_score")
    cells.append("" if score is None else "{:.2f} ± {:.2f}".format(*score))
    cells.append(distance(sets, "to_full_precision"))
    return f"| {' | '.join(cells)} |"


def distance(sets: dict[str, Any], key: str) -> str:
    """To three digits, however small: of large sets these distances are about 0.0006."""
    return (
        np.format_float_positional(sets[key], 3, fractional=False, trim="-") if key in sets else ""
    )


@dataclass(frozen=True)
class Goal:
    """What the issue asked for: a figure of one row against that of another."""

    text: str
    key: str  # latent: mean dB, more is better; or a distance, less is better
    row: str
    other: str
    offset: float = 0.0
    factor: float = 1.0

    def judged(self, rows: dict[str, dict[str, Any]]) -> str | None:
        """One line, where both rows are there; distances of sets are compared at equal counts, as
        a set's size is part of its distance."""
        pair = [rows.get(name) for name in (self.row, self.other)]
        of_sets = not self.key.startswith("latent")
        count = common_count(*pair, self.key) if of_sets and None not in pair else None
        found = [at_count(r, count, self.key) if of_sets else mean_of(r, self.key) for r in pair]
        if None in found:
            return None
        got, bound = found[0], found[1] * self.factor + self.offset
        verdict = "reached" if (got <= bound if of_sets else got >= bound) else "not reached"
        where = f" (of {count:,} pictures each)" if of_sets else ""
        return f"- {self.text}: {got:.4g}, bound {bound:.4g}: {verdict}{where}"


def common_count(one: dict[str, Any], other: dict[str, Any], key: str) -> int | None:
    """The most pictures of which both rows have the figure."""
    counts = [{int(n) for n, sets in row["at"].items() if key in sets} for row in (one, other)]
    return max(counts[0] & counts[1], default=None)


def at_count(row: dict[str, Any] | None, count: int | None, key: str) -> float | None:
    return None if row is None or count is None else row["at"][str(count)][key]


def mean_of(row: dict[str, Any] | None, key: str) -> float | None:
    value = None if row is None else row.get(key)
    return None if value is None else value["mean"]


def goals() -> list[Goal]:
    """Of the rows that there are."""
    names = {row.name for row in all_rows()}
    return [goal for goal in asked_for() if {goal.row, goal.other} <= names]


def asked_for() -> list[Goal]:
    """Of all weights, bits and scales alike."""
    found = []
    for weight in (8, 4, SIXTEEN):
        for scale in ("static", "dynamic"):

            def of(bits: int, how: str, weight: int = weight, scale: str = scale) -> str:
                return f"W{weight}A{bits} {how} {scale}"

            own = "latent_own_weights"
            text = f"W{weight}, {scale}"
            found += [
                Goal(
                    f"{text}: A8 modulated at least plain A8 + 18 dB",
                    own,
                    of(8, "MoDiff"),
                    of(8, "plain"),
                    18.0,
                ),
                Goal(
                    f"{text}: A4 modulated at least plain A8 - 0.5 dB",
                    own,
                    of(4, "MoDiff"),
                    of(8, "plain"),
                    -0.5,
                ),
                Goal(
                    f"{text}: A6 modulated's FID no more than plain A8's",
                    "fid",
                    of(6, "MoDiff"),
                    of(8, "plain"),
                ),
                Goal(
                    f"{text}: A8 modulated's FID within 3 % of 16-bit inputs'",
                    "fid",
                    of(8, "MoDiff"),
                    Row(weight).name,
                    0.0,
                    1.03,
                ),
                Goal(
                    f"{text}: A4 modulated 5 times nearer to full precision than plain",
                    "to_full_precision",
                    of(4, "MoDiff"),
                    of(4, "plain"),
                    0.0,
                    0.2,
                ),
            ]
    for scale in ("static", "dynamic"):
        found.append(
            Goal(
                f"W4A8 modulated within 0.3 dB of W4A16, {scale}",
                "latent",
                f"W4A8 MoDiff {scale}",
                "W4A16",
                -0.3,
            )
        )
    return found


def auto_lines(rows: dict[str, dict[str, Any]]) -> list[str]:
    """How much of the gain a quarter of the cache keeps."""
    return [
        text
        for row in all_rows()
        if row.modulate == "auto" and (text := auto_line(rows, row)) is not None
    ]


def auto_line(rows: dict[str, dict[str, Any]], row: Row) -> str | None:
    names = [replace(row, modulate=how, rest_bit=None).name for how in (None, "all")]
    values = [mean_of(rows.get(name), "latent_own_weights") for name in (*names, row.name)]
    if None in values:
        return None
    plain, whole, part = values
    kept = (part - plain) / (whole - plain)
    errors = [10 ** (-value / 10) for value in values]
    removed = (errors[0] - errors[2]) / (errors[0] - errors[1])
    verdict = "bound 80 %: " + ("reached" if kept >= 0.8 else "not reached")
    if row.rest_bit is not None:
        verdict = f"its other layers have A{row.rest_bit}, so nothing is judged"
    return (
        f"- {row.name}: keeps {100 * kept:.0f} % of the gain in dB, {verdict}; removes "
        f"{100 * removed:.0f} % of the error that all layers remove"
    )
